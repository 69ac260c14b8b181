"""The benchmark of fine-tuning on a toy: both loops train the same model, and both write the same texts."""

import csv
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
WORDS = [
    "le",
    "noyau",
    "gère",
    "les",
    "paquets",
    "et",
    "la",
    "mémoire",
    "du",
    "système",
    "quand",
    "une",
    "place",
    "manque",
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """120 pairs of texts, the targets a part of the sources."""
    pairs = []
    for n in range(120):
        words = [WORDS[(n * 7 + place * 5) % len(WORDS)] for place in range(10 + n % 21)] + [str(n)]
        pairs.append({"source": " ".join(words), "target": " ".join(words[::2])})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def test_both_sides_train_and_write_and_rows_are_appended(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.syspath_prepend(str(request.config.rootpath / "benchmarks"))
    import finetuning
    from finetuning_turns import FEWEST_ROUNDS

    command = ["finetuning.py", "--toy", "--data", str(data), "--output_dir", str(tmp_path), "--precision", "fp32"]
    for sections in ("training,predict", "lora"):
        if sections == "lora":
            pytest.importorskip("peft")
        monkeypatch.setattr(sys, "argv", [*command, "--sections", sections])
        finetuning.main()
    with (tmp_path / "finetuning.csv").open() as file:
        rows = {(row["case"], row["provider"], row["metric"]): row for row in csv.DictReader(file)}
    stock = "Seq2SeqTrainer sdpa"
    for case in ("fat5-demo fp32 training", "fat5-demo fp32 LoRA 16"):
        rates = [rows[case, name, "useful tokens/s"] for name in ("fat5 finetune", stock)]
        assert all(float(rate["p50"]) > 0 and int(rate["repeats"]) >= FEWEST_ROUNDS for rate in rates)
        assert rows[case, f"fat5 / {stock}", "speed-up"]["repeats"] == rates[0]["repeats"]
        assert 7 <= float(rows[case, "fat5 finetune", "examples a step"]["p50"]) <= 10  # eight are asked for
        for name in ("fat5 finetune", stock):
            assert 0.5 < float(rows[case, name, "useful share of its tokens"]["p50"]) <= 1
    for way in ("greedy", "4 beams"):
        case = f"fat5-demo fp32 predict 8 tokens, {way}"
        assert float(rows[case, "fat5 = stock generate", "equal texts"]["p50"]) == 1
        assert float(rows[case, "fat5 write_texts", "examples/s"]["p50"]) > 0
    assert all(row["machine"] and row["versions"] and row["command"] for row in rows.values())


def test_other_weights_are_not_timed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.syspath_prepend(str(request.config.rootpath / "benchmarks"))
    import finetuning

    def changed(bench: finetuning.Bench, *_: object) -> object:
        model = stock(bench)
        model.lm_head.weight.data *= 1.01
        return model

    stock = finetuning.Bench.stock
    monkeypatch.setattr(finetuning.Bench, "stock", changed)
    command = ["finetuning.py", "--toy", "--data", str(data), "--output_dir", str(tmp_path), "--sections", "training"]
    monkeypatch.setattr(sys, "argv", command)
    finetuning.main()
    assert len((tmp_path / "finetuning.csv").read_text().splitlines()) == 1  # the heading alone
