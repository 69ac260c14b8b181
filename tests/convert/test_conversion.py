"""`fat5 convert`: every family to every format, verified."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from sources import FAT5_POSITIONS, refused, run, stock
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5EncoderModel, T5ForConditionalGeneration

from fat5.cli.main import main
from fat5.convert.verification import compare, outputs, random_examples
from fat5.errors import ConfigurationError
from fat5.model import FAT5Config, FAT5EncoderModel, load_model


@pytest.mark.parametrize("to", ["hf", "fat5"])
@pytest.mark.parametrize("family", ["v1.0", "v1.1", "mT5", "umT5", "ByT5", "flash_t5", "encoder"])
def test_t5_positions_become_a_plain_t5(family: str, to: str, folder: Any) -> None:
    source = folder(family)
    report = run(source, to=to)
    made = report.target
    kind = "EncoderModel" if family == "encoder" else "ForConditionalGeneration"
    model_type = {"mT5": "mt5", "umT5": "umt5"}.get(family, "t5")
    written = json.loads((made / "config.json").read_text())
    assert written["model_type"] == model_type
    assert [one.difference <= one.tolerance for one in report.compared] == [True, True]
    # Against the stock model itself, and not what convert says of it.
    torch.manual_seed(0)
    want = stock("v1.1" if family == "flash_t5" else family)
    examples = random_examples(FAT5Config.from_pretrained(made), seed=5)
    cls = T5EncoderModel if family == "encoder" else AutoModelForSeq2SeqLM
    got = outputs(cls.from_pretrained(made).eval(), kind, examples)
    assert compare(got, outputs(want, kind, examples), "").difference <= 1e-5
    assert sum(report.files.values()) == sum(file.stat().st_size for file in made.rglob("*"))
    texts = ["Le noyau<extra_id_0> libre."]
    assert AutoTokenizer.from_pretrained(made)(texts) == AutoTokenizer.from_pretrained(source)(texts)


@pytest.mark.parametrize("positions", FAT5_POSITIONS)
def test_other_positions_stay_fat5(positions: str, folder: Any) -> None:
    source = folder(positions)
    report = run(source, "fat5")
    assert json.loads((report.target / "config.json").read_text())["model_type"] == "fat5"
    assert "import fat5  # registers" in (report.target / "README.md").read_text()
    shutil.rmtree(report.target)
    for to in ("hf", "ctranslate2"):
        with pytest.raises(ConfigurationError, match=f"{positions} positions: {to} has T5's only"):
            run(source, to=to)


# An export takes seconds.
LESS = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("encoder", "umT5", "fire", "alibi", "rope", "absolute", "none")
]


@pytest.mark.parametrize("family", ["v1.1", *LESS])
def test_onnx(family: str, folder: Any) -> None:
    import onnxruntime

    source = folder(family)
    report = run(source, "onnx")
    session = onnxruntime.InferenceSession(str(report.target / "model.onnx"))
    ids = torch.randint(3, 1000, (5, 37))
    mask = (torch.arange(37) < torch.tensor([37, 20, 5, 1, 36])[:, None]).long()
    got = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    with torch.no_grad():
        want = FAT5EncoderModel.from_pretrained(source).eval()(ids, mask).last_hidden_state
    assert compare(torch.from_numpy(got), want, "").difference <= 1e-5
    run_snippet(report.target)


def run_snippet(made: Path) -> dict[str, Any]:
    """Runs the snippet of a folder's card; returns its names."""
    text = (made / "README.md").read_text(encoding="utf-8")
    snippet = text.split("```python\n")[1].split("```")[0].replace("FOLDER", str(made))
    scope: dict[str, Any] = {}
    exec(compile(snippet, "README.md", "exec"), scope)
    return scope


@pytest.mark.parametrize("family", ["v1.0", "v1.1", "mT5", "ByT5", "flash_t5"])
def test_ctranslate2(family: str, folder: Any) -> None:
    import ctranslate2

    source = folder(family)
    report = run(source, "ctranslate2")
    [_, scores] = report.compared
    assert scores.difference <= 1e-5
    translator = ctranslate2.Translator(str(report.target), compute_type="float32")
    tokenizer = AutoTokenizer.from_pretrained(report.target)
    ids = tokenizer("[R] Le noyau<extra_id_0> est libre.").input_ids
    tokens = translator.translate_batch([tokenizer.convert_ids_to_tokens(ids)], beam_size=1, max_decoding_length=12)
    model = load_model(source, dtype=torch.float32)
    want = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, 1:].tolist()
    assert tokenizer.convert_tokens_to_ids(tokens[0].hypotheses[0]) == [token for token in want if token != 1]
    run_snippet(report.target)


def test_quantised_after_it_was_verified(folder: Any) -> None:
    report = run(folder("v1.1"), "ctranslate2", quantization="int8")
    assert any(note.startswith("quantised to int8: ") for note in report.notes)
    assert report.files["model.bin"] < 4 * report.parameters / 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(dtype: str, folder: Any) -> None:
    source = folder("v1.1")
    report = run(source, "hf", dtype=dtype)
    tensors = load_file(report.target / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert any("rounding the weights" in note for note in report.notes)
    before = load_file(source / "model.safetensors")
    assert all(torch.equal(tensors[name], before[name].to(getattr(torch, dtype))) for name in tensors)


def test_the_dtype_of_the_source_is_kept(folder: Any, tmp_path: Path) -> None:
    source = folder("v1.1")
    stock("v1.1").to(torch.bfloat16).save_pretrained(source)
    report = run(source, "hf")
    before, after = (load_file(where / "model.safetensors") for where in (source, report.target))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before)


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("ForSequenceClassification", {"classification_head.dense": 32, "classification_head.out_proj": 2}),
        ("ForTokenClassification", {"classifier": 2}),
        ("ForQuestionAnswering", {"qa_outputs": 2}),
    ],
)
def test_heads_of_the_first_fat5(kind: str, head: dict[str, int], folder: Any) -> None:
    source = folder("flash_t5")
    tensors = load_file(source / "model.safetensors")
    tensors = {name: x for name, x in tensors.items() if not name.startswith(("decoder.", "lm_head."))}
    for name, rows in head.items():
        tensors |= {f"{name}.weight": torch.randn(rows, 32), f"{name}.bias": torch.randn(rows)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"architectures": [f"FlashT5{kind}"]}
    (source / "config.json").write_text(json.dumps(config))
    report = run(source, "fat5")
    assert [one.difference <= one.tolerance for one in report.compared] == [True, True]
    if kind == "ForSequenceClassification":  # T5's reads a decoder
        shutil.rmtree(report.target)
        refused(source, ConfigurationError, "no class of stock transformers computes", to="hf")


def test_the_command(folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, made = folder("v1.1"), tmp_path / "by-command"
    assert main(["convert", str(source), "--to", "hf", "--output_dir", str(made), "--license", "apache-2.0"]) == 0
    out = capsys.readouterr().out
    assert "parameters" in out
    assert "stock transformers and FAT5 on the source" in out
    assert "stock transformers on the copy, FAT5 on the source" in out
    assert f"model.safetensors  {(made / 'model.safetensors').stat().st_size:,} bytes" in out
    assert main(["convert", str(source), "--to", "hf", "--output_dir", str(made)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["convert"]) == 2


def test_the_card_is_the_hub_s(folder: Any) -> None:
    source = folder("v1.1")
    (source / "README.md").write_text("---\nlicense: cc-by-4.0\nlanguage: fr\n---\n# Mine\n")
    made = run(source, "hf").target
    card = ModelCard.load(made / "README.md")
    assert (card.data.license, card.data.language, card.data.library_name) == ("cc-by-4.0", ["fr"], "transformers")
    assert (made / "SOURCE_README.md").read_text().endswith("# Mine\n")
    assert isinstance(run_snippet(made)["model"], T5ForConditionalGeneration)


def test_the_french_tokenizer_of_the_first_fat5(folder: Any) -> None:
    """BPE under the name of T5's class; the sentinels' ids rise, and its collator counted down from the last."""
    special = ["<cls>", "<s>", "</s>", "<mask>", "<pad>", "<sep>", "<unk>", *(f"<extra_id_{i}>" for i in range(256))]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    bpe.train_from_iterator(["Le noyau Linux est libre."], trainer)
    source = folder("flash_t5")
    bpe.save(str(source / "tokenizer.json"))
    names = special[7:107]  # those that the class took from its default of 100
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "additional_special_tokens": names}
    (source / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "</s>", "pad_token": "<pad>"}))
    report = run(source, "hf")
    assert any("the first blank is <extra_id_99>" in note for note in report.notes)
    assert AutoTokenizer.from_pretrained(report.target).convert_tokens_to_ids("<extra_id_99>") == 106
