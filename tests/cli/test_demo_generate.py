"""`fat5 demo` at width 32 keeps its contract, and `fat5 generate` works on what it leaves, and refuses what it must."""

import io
import json
import pickle
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from fat5.cli.main import main
from fat5.data.tokenizer.training import TokenizerTraining
from fat5.errors import ConfigurationError

SCRIPT = Path(__file__).parents[2] / "scripts" / "without_fat5.py"
TINY = "{d_model: 32, d_ff: 64, num_layers: 1, num_decoder_layers: 1, num_heads: 2, d_kv: 16}"
SMALL = {
    "tokenizer.vocab_size": "1024",
    "prepare.workers": "1",
    "pretrain.model.preset": "fat5-demo",
    "pretrain.model.overrides": TINY,
    "pretrain.data.max_tokens": "64",
    "pretrain.data.encoder_tokens": "512",
    "pretrain.data.decoder_tokens": "384",
    "pretrain.data.packs_per_step": "1",
    "pretrain.data.num_workers": "0",
    "pretrain.steps": "4",
    "pretrain.eval_tokens": "256",
}
FLAGS = [word for key, value in SMALL.items() for word in (f"--{key}", value)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "d"
    assert main(["demo", "--output_dir", str(folder), *FLAGS]) == 0
    return folder


def test_the_summary_holds_what_was_promised(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text(encoding="utf-8"))
    numbers = ["parameters", "seconds", "train_tokens", "tokens_per_second", "val_loss_first", "val_loss_last"]
    numbers += ["encoder_fill", "decoder_fill", "tokens_dropped", "unigram_entropy", "demo_seconds"]
    assert all(isinstance(summary[key], int | float) for key in numbers)
    assert summary["tokens_dropped"] == 0
    assert len(summary["val_loss_by_denoiser"]) == 7
    assert len(summary["samples"]) == 20
    for sample in summary["samples"]:
        before, after = sample["prompt"].split("___")
        assert "completion" in sample
        for text in (sample["text"], sample["original"]):
            assert text.startswith(before.rstrip())
            assert text.endswith(after)


def test_the_other_files_are_there(demo: Path) -> None:
    assert (demo / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (demo / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]


def test_the_model_s_card_tells_its_training(demo: Path) -> None:
    """Data, steps, losses, plot, and how it is loaded without FAT5; a converted copy keeps them."""
    summary = json.loads((demo / "summary.json").read_text(encoding="utf-8"))
    copied = demo.parent / "copied"
    assert main(["convert", str(demo), "--to", "fat5", "--output_dir", str(copied)]) == 0
    for folder in (demo / "model", copied):
        card = (folder / "README.md").read_text(encoding="utf-8")
        told = [
            "AutoModelForSeq2SeqLM.from_pretrained",
            "for 4 steps",
            "fr.jsonl.gz",
            "language:\n- fr",
            "[R]Le paquet est installé par la commande <extra_id_0> dans le terminal.",
            "![Loss, rate and throughput](loss.png)",
        ]
        told += [
            f"{summary['val_loss_first']:.4f} → **{summary['val_loss_last']:.4f}**",
            f"{summary['parameters']:,} par",
        ]
        told += [f"| {name} | {loss:.4f} |" for name, loss in summary["val_loss_by_denoiser"].items()]
        assert [text for text in told if text not in card] == []
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_stock_transformers_and_ctranslate2_read_the_model_without_fat5(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The transcript of scripts/without_fat5.py, in this environment with fat5 made unimportable."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(demo)])
    code = runpy.run_path(str(SCRIPT))["main"]()
    sys.stdout.flush()
    printed, error = capfd.readouterr()
    assert code == 0, printed + error
    for line in (
        "import fat5                No module named 'fat5'",
        "transformers.models.t5.modeling_t5.T5ForConditionalGeneration, missing 0, unexpected 0",
        "greedy tokens              the same",
        "CTranslate2, greedy        the same tokens",
    ):
        assert line in printed


def test_run_again_it_trains_no_further(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (demo / "metrics.jsonl").read_text()
    assert main(["demo", "--output_dir", str(demo), *FLAGS]) == 0
    assert (demo / "metrics.jsonl").read_text() == before
    assert "unigram entropy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "inputs"),
    [
        ([], ["sample:fr"]),
        (["--language", "de"], ["sample:de"]),
        (["--language", "de", "--tokenizer.inputs", "mine.txt"], ["mine.txt"]),
        (["--tokenizer.inputs", "sample:en"], ["sample:en"]),
    ],
)
def test_the_language_chooses_the_sample(
    words: list[str], inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(training: TokenizerTraining, progress: bool) -> None:
        assert training.inputs == inputs
        raise ConfigurationError("seen")

    monkeypatch.setattr("fat5.tasks.demo.train_tokenizer", stop)
    assert main(["demo", "--output_dir", str(tmp_path / "d"), *words]) == 2


def test_a_folder_with_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["demo", "--output_dir", str(tmp_path), *FLAGS]) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_vocabulary_that_cannot_be_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output_dir", str(tmp_path / "d"), *FLAGS, "--tokenizer.vocab_size", "70000"]) == 2
    err = capsys.readouterr().err
    assert "65,536" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "d" / "tokenizer").exists()


def test_prompts_from_words_file_and_standard_input(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--model", str(demo), "--max_new_tokens", "3", "--json_lines", "true"]
    prompts = ["Le noyau ___ est libre.", "Pour installer"]
    assert main(["generate", *flags, *prompts]) == 0
    words = capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n", encoding="utf-8")
    assert main(["generate", *flags, "--input", str(tmp_path / "prompts.txt")]) == 0
    assert capsys.readouterr().out == words
    stdin = io.TextIOWrapper(io.BytesIO("\n".join(prompts).encode()), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["generate", *flags, "--output", str(tmp_path / "out.jsonl")]) == 0
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == words
    assert [json.loads(line)["prompt"] for line in words.splitlines()] == prompts


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["generate", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_bad_prompts_get_one_line(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(demo)]
    empty, junk, huge = tmp_path / "empty.txt", tmp_path / "junk.txt", tmp_path / "huge.txt"
    empty.write_text("\n \n")
    junk.write_bytes(b"bon\n\xff\xfe\x00")
    huge.write_bytes(b"a" * 1_500_000)
    assert "no prompt" in refused([*model, "--input", str(empty)], capsys)
    assert "junk.txt:2: not UTF-8" in refused([*model, "--input", str(junk)], capsys)
    assert "huge.txt:1: a line of over 1 MB" in refused([*model, "--input", str(huge)], capsys)
    assert "cannot be read" in refused([*model, "--input", str(tmp_path / "none.txt")], capsys)
    assert "one of the two" in refused([*model, "--input", str(empty), "word"], capsys)
    assert "not UTF-8" in refused([*model, "a\udcff ___"], capsys)
    assert "nothing to fill in" in refused([*model, "--mode", "infill", "no blank"], capsys)
    assert "cannot be written" in refused([*model, "--output", str(tmp_path / "no" / "out"), "a ___"], capsys)
    for key in ("--max_new_tokens", "--num_beams"):
        assert "are free. Lower them" in refused([*model, key, "1000000000", "a ___"], capsys)


def test_bad_models_get_one_line(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model" in refused(["a ___"], capsys)
    assert "holds no model" in refused(["--model", str(tmp_path), "a ___"], capsys)

    evil = tmp_path / "evil"
    shutil.copytree(demo / "model", evil)
    (evil / "model.safetensors").unlink()
    (evil / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    assert "pickle" in refused(["--model", str(evil), "a ___"], capsys)

    cut = tmp_path / "cut"
    shutil.copytree(demo / "model", cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged" in refused(["--model", str(cut), "a ___"], capsys)

    mute = tmp_path / "mute"
    shutil.copytree(demo / "model", mute)
    (mute / "tokenizer.json").write_bytes(pickle.dumps({"a": 1}))
    assert "pickle" in refused(["--model", str(mute), "a ___"], capsys)

    other = tmp_path / "other"
    shutil.copytree(demo / "model", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    assert "bert" in refused(["--model", str(other), "a ___"], capsys)
