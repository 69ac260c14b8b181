"""Sizes that a configuration leaves open: they fit corpus and machine, and stay when a run goes on."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fat5.cli.main import main
from fat5.data import TokenizerInfo, suggest_budgets
from fat5.data.examples.packing import pack
from fat5.errors import ConfigurationError
from fat5.tasks import DataConfig, ModelConfig, PretrainConfig, SourceConfig, pretrain, sizes
from fat5.tasks.sizes import OPEN, WEB_PAGES, Text, choose_sizes, open_keys, settle
from fat5.train import World, read_rows
from fat5.train.cost.memory import GIB
from made_run import TINY, kill_at_row

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def chosen(tokens: int, device: torch.device, monkeypatch: pytest.MonkeyPatch, free: int = 80 * GIB, **data: object):
    """Sizes for so much web text, without a corpus."""
    monkeypatch.setattr(sizes, "WEB_PAGES", dataclasses.replace(WEB_PAGES, tokens=tokens))
    monkeypatch.setattr(World, "free_memory", lambda world: free)
    config = PretrainConfig("x", data=DataConfig([SourceConfig("nowhere")], **data), precision="bf16")
    info = TokenizerInfo(32768, 0, 1, 2, tuple(range(6, 262)), {"[R]": 3, "[S]": 4, "[X]": 5}, "")
    return choose_sizes(config, World(device), info)


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("tokens", [3_000, 170_000, 5_000_000, 200_000_000, 50_000_000_000])
def test_they_fit_any_corpus(tokens: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    config = chosen(tokens, device, monkeypatch)
    assert open_keys(config) == []
    batch = config.data.batch()
    batch.check_longest(*config.data.denoisers().max_lengths(batch.max_tokens, 256))
    assert batch.encoder_tokens * batch.packs_per_step <= 8 * 16_384
    assert 500 <= config.steps <= 100_000
    passes = config.steps * dataclasses.replace(WEB_PAGES, tokens=tokens).tokens_a_step(batch) / tokens
    assert passes == pytest.approx(4, rel=0.02) or config.steps in (500, 100_000)
    assert 1 <= config.eval_every <= 500
    assert 1_024 <= config.eval_tokens <= 65_536


def test_a_laptop_and_a_large_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    laptop = chosen(170_000, CPU, monkeypatch)
    assert (laptop.model.preset, laptop.data.encoder_tokens, laptop.data.packs_per_step) == ("fat5-demo", 1024, 1)
    assert (laptop.data.max_tokens, laptop.data.num_workers) == (256, 0)
    large = chosen(50_000_000_000, GPU, monkeypatch)
    assert (large.model.preset, large.data.encoder_tokens, large.data.packs_per_step) == ("fat5-base", 16384, 8)
    assert (large.data.max_tokens, large.steps) == (1024, 100_000)


def test_packs_shrink_to_the_memory_and_the_step_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    small = chosen(50_000_000_000, GPU, monkeypatch, free=12 * GIB)
    assert small.data.encoder_tokens < 16_384
    assert small.data.encoder_tokens * small.data.packs_per_step == 8 * 16_384


def test_what_is_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    config = chosen(5_000_000, CPU, monkeypatch, max_tokens=1024, packs_per_step=3)
    assert (config.data.max_tokens, config.data.packs_per_step) == (1024, 3)
    assert config.data.encoder_tokens >= 4 * 1024
    small = chosen(5_000_000, CPU, monkeypatch, encoder_tokens=512)
    assert (small.data.encoder_tokens, small.data.max_tokens) == (512, 128)


def test_the_decoder_s_budget_is_the_one_the_audit_suggests(prepared: Path) -> None:
    config = settle(
        PretrainConfig("x", data=DataConfig([SourceConfig(str(prepared))], encoder_tokens=16384)), World(CPU)
    )
    text = Text.of(sizes._stream(config))
    assert config.data.decoder_tokens == suggest_budgets(text.encoder, text.decoder, 16384)[1]
    assert 8_000 < config.data.decoder_tokens < 16_384


def test_slots_of_a_pack_fit_its_documents(prepared: Path) -> None:
    """Packs of this corpus have room for a few documents more than any of them takes, and the same packs come out."""
    config = PretrainConfig("x", data=DataConfig([SourceConfig(str(prepared))], encoder_tokens=16384))
    settled = settle(config, World(CPU))
    stream, batch = sizes._stream(settled), settled.data.batch()
    seen = stream.resolve(np.arange(8192))
    most, roomy = batch.examples_per_pack, dataclasses.replace(batch, max_examples=None)
    budgets = seen.encoder, seen.decoder, batch.encoder_tokens, batch.decoder_tokens
    packs = pack(*budgets, max_examples=most)
    assert packs == pack(*budgets, max_examples=roomy.examples_per_pack)
    assert max(map(len, packs)) <= most < 1.6 * max(map(len, packs)) < roomy.examples_per_pack


def test_slots_of_web_pages_and_of_short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(50_000_000_000, GPU, monkeypatch).data.max_examples == 80
    assert chosen(50_000_000_000, GPU, monkeypatch, max_examples=200).data.max_examples == 200
    short = dataclasses.replace(WEB_PAGES, encoder=16.0, encoder_deviation=16.0)
    assert short.most_examples(16384) == 16384 // 16
    assert WEB_PAGES.most_examples(1024) == 16


def test_a_run_from_before_slots_were_chosen_keeps_its_packs(prepared: Path, tmp_path: Path) -> None:
    pretrain(open_run(prepared, tmp_path / "run", steps=3))
    path = tmp_path / "run" / "config.yaml"
    written = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(written | {"data": written["data"] | {"max_examples": None}}))
    assert settle(open_run(prepared, tmp_path / "run", steps=3), World(CPU)).data.max_examples == 1024 // 16


def open_run(prepared: Path, folder: Path, **changes: object) -> PretrainConfig:
    """A run of which nothing is given but model, data and steps."""
    model = ModelConfig(preset="fat5-demo", overrides=TINY)
    settings = {"steps": 6, "save_every": 3, "log_every": 100} | changes
    return PretrainConfig(str(folder), model=model, data=DataConfig([SourceConfig(str(prepared))]), **settings)  # type: ignore[arg-type]


def test_a_run_keeps_what_was_chosen(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, and started again by the same command on another machine, it is the same run."""
    from made_run import in_child

    def work() -> None:
        kill_at_row(6)()
        pretrain(open_run(prepared, tmp_path / "run"))

    assert in_child(work) == -9
    before = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert "auto" not in [before["steps"], before["eval_every"], before["eval_tokens"], *before["data"].values()]
    monkeypatch.setattr(sizes, "SMALLEST_PACK", 4096)
    monkeypatch.setattr(sizes, "PASSES", 40)
    pretrain(open_run(prepared, tmp_path / "run"))
    after = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert after == before
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"] == [
        *range(1, 7)
    ]


def test_a_checkpoint_elsewhere_brings_its_sizes(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(open_run(prepared, tmp_path / "one", steps=3))
    monkeypatch.setattr(sizes, "SMALLEST_PACK", 4096)
    again = open_run(prepared, tmp_path / "two", steps=3, resume=str(tmp_path / "one" / "checkpoints" / "step-3"))
    assert settle(again, World(CPU)).data.encoder_tokens == 1024


def test_auto_is_a_word_for_sizes_alone(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--output_dir", str(tmp_path / "run"), "--data.sources", f'[{{"path": "{prepared}"}}]']
    assert main(["pretrain", *flags, "--log_every", "auto"]) == 2
    assert main(["pretrain", *flags, "--steps", "many"]) == 2
    assert main(["pretrain", *flags, "--data.packs_per_micro_batch", "0"]) == 2
    assert "packs_per_micro_batch" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(ConfigurationError, match=r"steps: must be a whole number .* not -1"):
        PretrainConfig("x", data=DataConfig([SourceConfig("a")]), steps=-1).resolved()


def test_every_open_key_exists() -> None:
    assert open_keys(PretrainConfig()) == list(OPEN)
