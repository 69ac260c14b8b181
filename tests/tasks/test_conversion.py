"""`fat5 convert`: every family to every format, verified; what cannot be is refused in one line, with nothing left."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ByT5Tokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from fat5.cli.main import main
from fat5.data.tokenizer_training import TokenizerTraining, train_tokenizer
from fat5.errors import CheckpointError, ConfigurationError, FAT5Error, TokenizerError
from fat5.model import FAT5Config, FAT5EncoderModel, FAT5ForConditionalGeneration, configuration, load_model
from fat5.tasks import ConvertConfig, conversion, convert
from fat5.tasks.verification import compare, outputs, random_examples

SIZES: dict[str, Any] = dict(
    vocab_size=1024, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
    decoder_start_token_id=0, dropout_rate=0.0,
)  # fmt: skip
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def stock(family: str) -> Any:
    """A stock model with weights that are all random: norms and output projection too."""
    if family == "v1.0":
        model: Any = T5ForConditionalGeneration(T5Config(**SIZES))
    elif family == "v1.1":
        model = T5ForConditionalGeneration(T5Config(**SIZES, **GATED))
    elif family == "mT5":
        model = MT5ForConditionalGeneration(MT5Config(**SIZES, tie_word_embeddings=False))
    elif family == "umT5":
        model = UMT5ForConditionalGeneration(UMT5Config(**SIZES, tie_word_embeddings=False))
    elif family == "ByT5":
        model = T5ForConditionalGeneration(T5Config(**(SIZES | GATED | {"vocab_size": 384, "num_layers": 4})))
    else:
        model = T5EncoderModel(T5Config(**SIZES))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.2 * torch.randn_like(parameter)
    if family not in ("v1.0", "encoder"):
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer(TokenizerTraining(inputs=["sample:fr"], output_dir=str(folder), vocab_size=1024, rows=200))
    return folder


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Path) -> Any:
    """Makes the folder of a model of some family."""

    def make(family: str) -> Path:
        target = tmp_path / "source"
        if family == "flash_t5":
            as_flash_t5(stock("v1.1"), target)
        elif family in FAT5_POSITIONS:
            config = FAT5Config(**SIZES, **GATED, position_encoding=family)
            FAT5ForConditionalGeneration(config).save_pretrained(target)
        else:
            stock(family).save_pretrained(target)
        if family == "ByT5":
            ByT5Tokenizer().save_pretrained(target)
        else:
            shutil.copytree(tokenizer, target, dirs_exist_ok=True)
        return target

    return make


FAT5_POSITIONS = ("alibi", "rope", "fire", "absolute", "none")
FLASH_NAMES = (
    ("layer.0.SelfAttention.relative", "self_attention_layer.self_attention.pe_encoding.relative"),
    *((f"layer.0.SelfAttention.{x}.", f"self_attention_layer.self_attention.W{x}.") for x in "qkv"),
    ("layer.0.SelfAttention.o.", "self_attention_layer.self_attention.o."),
    ("layer.0.layer_norm.", "self_attention_layer.layer_norm."),
    *((f"layer.1.EncDecAttention.{x}.", f"cross_attention_layer.cross_attention.W{x}.") for x in "qkv"),
    ("layer.1.EncDecAttention.o.", "cross_attention_layer.cross_attention.o."),
)


def as_flash_t5(model: Any, target: Path) -> None:
    """The same weights as the first FAT5 wrote them."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        old = name
        for new_part, old_part in FLASH_NAMES:
            old = old.replace(new_part, old_part)
        if "DenseReluDense" in old or (".layer_norm." in old and ".layer." in old):
            side = "encoder" if old.startswith("encoder") else "decoder"
            feed_forward = "layer.1." if side == "encoder" else "layer.2."
            old = old.replace("layer.1.layer_norm.", "cross_attention_layer.layer_norm.") if side == "decoder" else old
            old = old.replace(f"{feed_forward}layer_norm.", "ff_layer.layer_norm.")
            old = old.replace(f"{feed_forward}DenseReluDense.wo.", "ff_layer.wo.")
            old = old.replace(f"{feed_forward}DenseReluDense.", "ff_layer.act.")
        if "embed_tokens" not in old:
            tensors[old] = tensor.contiguous()
    target.mkdir(parents=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    keys = SIZES | {"use_glu_mlp": True, "use_gelu_act": True, "position_encoding_type": "t5", "attention_scale": 1.0}
    # As transformers 4 derived them, whatever the model was.
    keys |= {"feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": False}
    content = keys | {"model_type": "flash_t5", "architectures": ["FlashT5ForConditionalGeneration"]}
    (target / "config.json").write_text(json.dumps(content | {"eos_token_id": 1, "pad_token_id": 0}))


def run(source: Path, to: str, **options: Any) -> conversion.Conversion:
    return convert(ConvertConfig(model=str(source), output_dir=str(source.parent / "made"), to=to, **options))


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


# Seconds each; FIRE's bias is made by a network, the others differ less.
LESS = [pytest.param(name, marks=pytest.mark.slow) for name in ("alibi", "rope", "absolute", "none")]


@pytest.mark.parametrize("family", ["v1.1", "umT5", "encoder", "fire", *LESS])
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


def test_weights_beyond_float16_are_refused(folder: Any) -> None:
    source = folder("v1.1")
    change(source, "encoder.final_layer_norm.weight", lambda x: x * 1e6)
    refused(source, CheckpointError, r"final_layer_norm\.weight holds .* which float16 cannot", dtype="float16")


@pytest.mark.parametrize("to", ["hf", "fat5", "ctranslate2", "onnx"])
def test_weights_that_are_no_numbers_are_named(to: str, folder: Any) -> None:
    source, name = folder("v1.1"), "encoder.final_layer_norm.weight"
    change(source, name, lambda x: x * float("nan"))
    refused(source, CheckpointError, rf"{name} holds NaN or infinity", to=to)


def change(source: Path, name: str, function: Any) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors[name] = function(tensors[name])
    save_file({k: v.contiguous() for k, v in tensors.items()}, source / "model.safetensors", metadata={"format": "pt"})


def refused(source: Path, error: type[FAT5Error], match: str, to: str = "hf", **options: Any) -> None:
    """Refused in one line, and nothing is left beside the source."""
    before = sorted(path.name for path in source.parent.iterdir())
    with pytest.raises(error, match=match) as raised:
        run(source, to, **options)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in source.parent.iterdir()) == before


def test_bad_configurations(folder: Any, tmp_path: Path) -> None:
    source = folder("v1.1")
    config = json.loads((source / "config.json").read_text())
    for content, match in (
        (config | {"model_type": "bert"}, "'bert'"),
        (config | {"architectures": ["T5ForDreams"]}, "holds a T5ForDreams"),
        (config | {"d_model": "wide"}, "d_model"),
        (config | {"d_model": 40}, "shape"),
        (config | {"num_heads": 0}, "num_heads"),
        ([1], "JSON object"),
    ):
        (source / "config.json").write_text(json.dumps(content))
        refused(source, FAT5Error, match)
    (source / "config.json").write_text("{")
    refused(source, CheckpointError, "is not JSON")
    (source / "config.json").unlink()
    refused(source, CheckpointError, r"no config\.json")
    refused(tmp_path / "nowhere", CheckpointError, "does not exist")


def test_bad_weights(folder: Any) -> None:
    source = folder("v1.1")
    file = source / "model.safetensors"
    good = load_file(file)

    def write(tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, file, metadata={"format": "pt"})

    name = "decoder.block.1.layer.1.EncDecAttention.k.weight"
    write({key: value for key, value in good.items() if key != name})
    refused(source, CheckpointError, rf"lacks 1 tensors, {name}")
    write(good | {"encoder.block.9.layer.0.SelfAttention.q.weight": torch.zeros(2)})
    refused(source, CheckpointError, "no place for")
    write(good | {name: torch.zeros(3, 3)})
    refused(source, CheckpointError, r"shape \(3, 3\)")
    write(good)
    file.write_bytes(file.read_bytes()[:-100])
    refused(source, CheckpointError, "damaged")
    file.unlink()
    refused(source, CheckpointError, r"no model\.safetensors")


def test_pickles_only_as_tensors(folder: Any, tmp_path: Path) -> None:
    import pickle

    source = folder("v1.1")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    report = run(source, "hf")
    assert (report.target / "model.safetensors").is_file()
    shutil.rmtree(report.target)

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.mkdir, (tmp_path / "crater",)

    (source / "pytorch_model.bin").write_bytes(pickle.dumps({"shared.weight": Bomb()}))
    refused(source, CheckpointError, "pickle")
    assert not (tmp_path / "crater").exists()


def test_a_tokenizer_larger_than_the_vocabulary(folder: Any, tokenizer: Path) -> None:
    source = folder("ByT5")
    (source / "tokenizer_config.json").unlink()
    refused(source, TokenizerError, r"has 1,024 tokens, and the model only 384", tokenizer=str(tokenizer))
    refused(source, TokenizerError, "holds no tokenizer, whose tokens ctranslate2 needs", to="ctranslate2")
    report = run(source, "hf")
    assert any("no tokenizer" in note for note in report.notes)


def test_keys_that_cannot_be(folder: Any, tmp_path: Path) -> None:
    source = folder("v1.1")
    refused(source, ConfigurationError, "quantization is CTranslate2's", quantization="int8")
    refused(source, ConfigurationError, "onnx is written in float32", to="onnx", dtype="float16")
    (source.parent / "made").mkdir()
    (source.parent / "made" / "thing").write_text("mine")
    refused(source, ConfigurationError, "exists")
    assert (source.parent / "made" / "thing").read_text() == "mine"


def test_umt5_is_not_for_ctranslate2(folder: Any) -> None:
    refused(folder("umT5"), ConfigurationError, "bias table in every layer", to="ctranslate2")


def test_an_encoder_is_not_for_ctranslate2(folder: Any) -> None:
    refused(folder("encoder"), ConfigurationError, "a T5EncoderModel", to="ctranslate2")


@pytest.mark.parametrize(("to", "package"), [("onnx", "onnxruntime"), ("ctranslate2", "ctranslate2")])
def test_a_missing_package_is_named(to: str, package: str, folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "find_spec", lambda name: None if name == package else name)
    refused(
        folder("v1.1"), ConfigurationError, rf"needs {package}, not installed here. pip install 'fat5\[{to}\]'", to=to
    )


def test_a_copy_that_computes_otherwise_is_not_written(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor is changed between saving and verifying, as a wrong name or layout would."""
    save = conversion._save

    def spoil(model: Any, stored: torch.dtype, where: Path) -> None:
        save(model, stored, where)
        change(where, "encoder.block.1.layer.0.SelfAttention.q.weight", lambda x: x.flip(0))

    monkeypatch.setattr(conversion, "_save", spoil)
    source = folder("v1.1")
    for to in ("hf", "fat5", "ctranslate2"):
        refused(source, CheckpointError, "computes something else", to=to)


def misread(found: dict[str, Any], where: object) -> dict[str, Any]:
    """Another activation than the source's."""
    return RIGHT(found, where) | {"feed_forward_proj": "gated-relu", "is_gated_act": True, "dense_act_fn": "relu"}


RIGHT = configuration._as_fat5


@pytest.mark.parametrize("to", ["hf", "fat5", "ctranslate2", "onnx"])
@pytest.mark.parametrize("family", ["flash_t5", "v1.1"])
def test_a_source_that_is_misread_is_not_converted(
    family: str, to: str, folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy would compute what FAT5 read, and not what the source does."""
    monkeypatch.setattr(configuration, "_as_fat5", misread)
    refused(folder(family), CheckpointError, "computes something else: outputs .* on the source", to=to)


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


def test_folders_above_the_target_go_too_or_stay(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = folder("v1.1"), tmp_path / "new" / "newer" / "made"
    how = ConvertConfig(model=str(source), output_dir=str(target))
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "outputs", lambda *_: torch.full((2,), float("nan")))
        with pytest.raises(CheckpointError, match="nothing was written"):
            convert(how)
    assert not (tmp_path / "new").exists()
    convert(how)
    assert (target / "config.json").is_file()


def test_a_full_disk_leaves_nothing(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    source = folder("v1.1")
    monkeypatch.setattr(conversion, "_write_card", full)
    refused(source, ConfigurationError, "No space left on device")


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
    snippet = card.text.split("```python\n")[1].split("```")[0].replace("FOLDER", str(made))
    scope: dict[str, Any] = {}
    exec(compile(snippet, "README.md", "exec"), scope)
    assert isinstance(scope["model"], T5ForConditionalGeneration)


@pytest.mark.parametrize("to", ["ctranslate2", "onnx"])
def test_the_card_s_snippet_runs(to: str, folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made = run(folder("v1.1"), to).target
    snippet = (made / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("FOLDER", str(made))
    exec(compile(snippet, "README.md", "exec"), {})


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
