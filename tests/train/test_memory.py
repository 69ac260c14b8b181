"""The memory plan against what autograd really keeps and what a process really takes; and what a run says of it."""

import gc
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import _VersionWrapper

from fat5 import machine
from fat5.cli.main import main
from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from fat5.model.activations import checkpoint_activations
from fat5.tasks import ModelConfig
from fat5.train.cost.memory import GIB, activations
from fat5.train.precision import Precision
from made_run import command, tiny

# The count leaves out the small (norms' roots, softmax statistics), so it may be a quarter off, no more.
SHARE = 0.25


def config_of(layers: int, **more: float) -> FAT5Config:
    return FAT5Config.preset("fat5-demo", vocab_size=256, num_layers=layers, num_decoder_layers=layers, **more)


@pytest.mark.parametrize(
    ("policy", "precision", "dropout"),
    [
        ("none", "fp32", 0.0),
        ("selective", "fp32", 0.0),
        ("block", "fp32", 0.0),
        ("none", "fp32", 0.1),
        ("none", "bf16", 0.0),
        ("none", "bf16", 0.1),
    ],
)
def test_activations_are_what_is_kept(policy: str, precision: str, dropout: float) -> None:
    config = config_of(3, dropout_rate=dropout, attention_dropout_rate=0.0)
    model = FAT5ForConditionalGeneration(config).train()
    checkpoint_activations(model, policy)
    encoder, decoder, documents = 768, 512, 4
    batch = {
        "input_ids": torch.randint(3, 256, (encoder,)),
        "labels": torch.randint(3, 256, (decoder,)),
        "cu_seqlens": torch.arange(documents + 1, dtype=torch.int32) * (encoder // documents),
        "decoder_cu_seqlens": torch.arange(documents + 1, dtype=torch.int32) * (decoder // documents),
        "max_seqlen": encoder // documents,
        "decoder_max_seqlen": decoder // documents,
    }
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    casts = {weight.shape for weight in model.parameters()}  # autocast keeps them, and the plan has them elsewhere
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        cast = tensor.dtype == torch.bfloat16 and {tensor.shape, tensor.t().shape if tensor.ndim == 2 else None} & casts
        if storage.data_ptr() not in weights and not cast:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        Precision(precision, torch.device("cpu")).autocast(),
    ):
        loss = model(**batch).loss
    assert loss.requires_grad
    for value in _selected():
        pack(value)
    measured, size = sum(kept.values()), 4 if precision == "fp32" else 2
    planned = activations(config, encoder, decoder, size, policy, on_cpu=True)  # type: ignore[arg-type]
    if policy == "none":
        assert abs(measured - planned) < SHARE * measured, f"planned {planned:,}, measured {measured:,}"
        return
    # Between forward and backward nothing is recomputed yet; the plan's one block has room for the rest.
    model.config.num_layers = model.config.num_decoder_layers = 0
    kept_ones = planned - activations(model.config, encoder, decoder, size, policy, on_cpu=True)  # type: ignore[arg-type]
    assert (1 - SHARE) * kept_ones < measured < planned, f"planned {planned:,}, measured {measured:,}"
    whole = activations(config_of(3, dropout_rate=dropout), encoder, decoder, size, "none", on_cpu=True)
    assert planned < whole * (0.8 if policy == "selective" else 0.5)


def _selected() -> Iterator[torch.Tensor]:
    """What selective checkpointing holds outside autograd: in the storage of its contexts."""
    for one in gc.get_objects():
        if type(one) is _VersionWrapper:
            yield one.val


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="waits for a system that tells a process's peak")
def test_the_plan_is_what_a_process_takes(prepared: Path, tmp_path: Path) -> None:
    sizes = {"max_tokens": 256, "encoder_tokens": 2048, "decoder_tokens": 1536, "packs_per_step": 1}
    config = tiny(prepared, tmp_path / "run", data=sizes, steps=2, save_every=1, eval_tokens=256)
    config = replace(config, model=ModelConfig("fat5-demo"))
    code, error = command(config, fault={"measure": {"target": str(tmp_path / "bytes")}})
    assert code == 0, error
    planned, measured = map(int, (tmp_path / "bytes").read_text().split())
    assert abs(planned - measured) < SHARE * measured, f"planned {planned / GIB:.2f} GiB, measured {measured / GIB:.2f}"


def test_a_run_beyond_the_memory_is_refused_before_it_spends(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 2 * GIB)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny(prepared, tmp_path / "run").to_yaml())
    flags = ["--config", str(recipe), "--model.preset", "fat5-large", "--model.overrides", "{}"]
    assert main(["pretrain", *flags]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"fat5 pretrain: the run needs about [\d.]+ GiB \(weights .*\), and 2.0 GiB .*\n", err)
    assert not (tmp_path / "run").exists()
    assert main(["doctor", *flags, "--json_output"]) == 2
    assert err.removeprefix("fat5 pretrain: ").strip()[:40] in capsys.readouterr().out, "doctor says the same"


def test_a_run_says_what_it_will_take(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny(prepared, tmp_path / "run").to_yaml())
    assert main(["pretrain", "--config", str(recipe)]) == 0
    lines = capsys.readouterr().err.splitlines()
    model, step, run, room = (next(line for line in lines if line.startswith(word)) for word in WORDS)
    assert "parameters" in model
    assert "768 tokens: 2 packs of 256 (encoder) + 128 (decoder)" in step
    assert re.search(r"8 steps, 6,144 tokens; 0\.\d+ passes over [\d,]+ tokens of text", run)
    assert re.search(r"about 0\.\d\d GiB \(weights .*\) of \d+\.\d GiB free", room)
    assert any(re.match(r"time    about \d+:\d\d for the 3 steps that are left", line) for line in lines)


WORDS = ("model ", "step ", "run ", "memory ")
