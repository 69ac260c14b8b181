"""A model folder that is damaged, unsafe or of another kind: the verbs that read it say so in one line, exit code 2."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

from fat5.cli.main import main

KEY = "decoder.block.1.layer.1.EncDecAttention.k.weight"
VOCABULARY = 384  # ByT5's tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound ByT5."""
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    target = tmp_path / "model"
    model.save_pretrained(target)
    ByT5Tokenizer().save_pretrained(target)
    return target


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def config(**keys: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return damage


def in_turn(*damages: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def generation(**keys: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return damage


def cut(keep: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return damage


def shards(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        model = T5ForConditionalGeneration.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="20KB")
        change(folder)

    return damage


def no_second_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def no_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


class Bomb:
    """What a malicious pickle holds: a call."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.crater,)


def bomb(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"shared.weight": Bomb(folder / "crater")}))


def cut_binary(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:2000])


def binary(content: Callable[[dict[str, torch.Tensor]], Any], keep: float = 1.0, **how: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "pytorch_model.bin"
        torch.save(content(load_file(folder / "model.safetensors")), path, **how)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        (folder / "model.safetensors").unlink()

    return damage


def elsewhere(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][KEY] = "../other/model.safetensors"
    index.write_text(json.dumps(content))


def as_integers(folder: Path) -> None:
    """The same bytes under another type, as a wrong header says."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"'))


def adapter(folder: Path) -> None:
    """What `save_pretrained` of a PEFT model leaves."""
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "google/t5-v1_1-base"}'
    )


CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (tensors(lambda t: t.pop(KEY)), f"lacks 1 tensors, {KEY}"),
    "extra tensor": (tensors(lambda t: t.update({"encoder.extra": torch.zeros(2)})), "no place for, encoder.extra"),
    "misshapen tensor": (tensors(lambda t: t.update({KEY: torch.zeros(3, 3)})), f"{KEY} has shape (3, 3)"),
    "truncated file": (cut(0.9), "damaged"),
    "truncated header": (cut(0.001), "damaged"),
    "missing shard": (shards(no_second_shard), "model-00002-of"),
    "index without a map": (shards(no_map), "names no file for each tensor"),
    "another type of model": (config(model_type="bert"), "'bert'"),
    "another width": (config(d_model=24), "shape"),
    "another width, and the table twice": (
        in_turn(
            tensors(lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"].clone()})),
            config(d_model=24),
        ),
        "of another shape than the configuration wants",
    ),
    "a width that no memory holds": (config(d_model=1 << 24, d_ff=1 << 24), "more memory than there is"),
    "padding outside the vocabulary": (config(pad_token_id=10**6), "pad_token_id: expected a token of the 384"),
    "weights quantised by a library that is not here": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), "quantised",
    ),
    "a label for each of 2^70 classes": (config(num_labels=2**70), "num_labels: expected 1 to 1,048,576, got"),
    "a number of labels that is null": (config(num_labels=None), "num_labels: expected 1 to"),
    "labels that are no mapping": (config(id2label=["a"]), "id2label: expected number → label, got \"['a']\""),
    "classes that are no names": (config(architectures=5), "5"),
    "a type of model that is a list": (config(model_type=[]), "model_type: expected a name"),
    "no family": (config(family="t6"), "family: expected t5, mt5 or umt5, got 't6'"),
    "no dtype": (config(dtype="float31"), "dtype: expected the name of a dtype, got 'float31'"),
    "a dtype that is a number": (config(torch_dtype=-1), "torch_dtype: expected the name of a dtype"),
    "an activation that is derived": (config(dense_act_fn=None), "dense_act_fn: expected an activation"),
    "a word for a bool": (config(is_gated_act="yes"), "is_gated_act: expected true or false"),
    "no attention": (config(attn_implementation="x"), "attn_implementation: expected one of eager, sdpa"),
    "a configuration in the configuration": (config(text_config={"a": 1}), "text_config: expected nothing"),
    "a word for a width, under its other name": (config(hidden_size="x"), "d_model: expected a whole number, got 'x'"),
    "experts": (config(experts_implementation="x"), "experts_implementation: expected nothing"),
    "no way of quantising": (config(quantization_config={}), "quantization_config: expected a quant_method"),
    "a start outside the vocabulary": (config(decoder_start_token_id=-1), "decoder_start_token_id: expected a token"),
    "an end that is no number": (config(eos_token_id=[1, "x"]), "eos_token_id"),
    "layers without end": (config(num_layers=10**12), "num_layers: expected 1 to 4,096"),
    "a configuration nested too deeply": (
        lambda folder: (folder / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"), "JSON",
    ),
    "an index nested too deeply": (
        shards(lambda at: (at / "model.safetensors.index.json").write_text("[" * 100_000)), "is not JSON",
    ),
    "a configuration that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "JSON object"),
    "settings of generation that are a list": (
        lambda folder: (folder / "generation_config.json").write_text("[]"), "config.json: is not a JSON object",
    ),
    "settings of generation nested too deeply": (
        lambda folder: (folder / "generation_config.json").write_text("[" * 100_000), "is not JSON",
    ),
    "a length that is a word": (generation(max_new_tokens="x"), "generation_config.json: cannot be used: '<=' not"),
    "half a configuration": (lambda folder: (folder / "config.json").write_text('{"d_model": 1'), "config"),
    "a word for a number": (config(d_model="wide"), "d_model"),
    "an unknown activation": (config(feed_forward_proj="gated-dreams"), "feed_forward_proj"),
    "a pickle with a call": (bomb, "pickle that holds more than tensors"),
    "a truncated pickle": (cut_binary, "damaged: pytorch_model.bin"),
    "a truncated pickle of old": (
        binary(dict, keep=0.5, _use_new_zipfile_serialization=False), "damaged: pytorch_model.bin: unexpected EOF",
    ),
    "a pickle of a list": (binary(list), "holds no names with tensors"),
    "a checkpoint of Lightning": (
        binary(lambda t: {"state_dict": t, "epoch": 3}), "holds state_dict, epoch beside or around its tensors",
    ),
    "a pickle of whole numbers": (
        binary(lambda t: {name: x.int() for name, x in t.items()}), "holds torch.int32, and weights are",
    ),
    "whole numbers": (as_integers, "holds I32, and weights are floating-point numbers"),
    "NaN": (tensors(lambda t: t[KEY][0].fill_(float("nan"))), f"{KEY} holds NaN or infinity"),
    "infinity": (tensors(lambda t: t["lm_head.weight"][5, 5].fill_(-float("inf"))), "lm_head.weight holds NaN or inf"),
    "an adapter": (adapter, "needs its base model. merge the two: python"),
    "an adapter beside a model": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter of PEFT",
    ),
    "an index that names a file of another folder": (shards(elsewhere), "model.safetensors', which is not in"),
    "another pickle": (lambda at: (at / "model.safetensors").rename(at / "model.pt"), "model.pt: is a pickle"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "holds"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
    "a tokenizer with more tokens than rows": (
        lambda folder: [
            tensors(lambda t: t.update({name: t[name][:300] for name in ("shared.weight", "lm_head.weight")}))(folder),
            config(vocab_size=300)(folder),
        ],
        "384 tokens, and the model only 300 rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["generate", "convert"])
@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_written(
    case: str, verb: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, says = CASES[case]
    damage(folder)
    before = sorted(path.name for path in tmp_path.iterdir())
    capsys.readouterr()
    argv = {
        "generate": ["generate", "--model", str(folder), "--mode", "text", "--max_new_tokens", "2", "Bonjour"],
        "convert": ["convert", str(folder), "--to", "hf", "--output_dir", str(tmp_path / "made")],
    }[verb]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"fat5 {verb}: ")
    assert says in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not (folder / "crater").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("decoder_start_token_id", -1),
        ("decoder_start_token_id", True),
        ("pad_token_id", 2**70),
        ("eos_token_id", 1e300),
        ("begin_suppress_tokens", 5),
        ("forced_eos_token_id", {}),
        ("num_beams", "x"),
        ("top_k", 1.5),
    ],
)
def test_settings_of_generation_that_cannot_be(
    key: str, value: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generation(**{key: value, "do_sample": True})(folder)
    capsys.readouterr()
    assert main(["generate", "--model", str(folder), "--mode", "text", "--max_new_tokens", "2", "Bonjour"]) == 2
    assert f"generation_config.json: {key} is {str(value)!r}" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["generate", "convert"])
def test_a_pickle_of_tensors_alone_is_read(verb: str, folder: Path, tmp_path: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    how = ["--model", str(folder), "Bonjour ___"] if verb == "generate" else [str(folder), "--output_dir"]
    assert main([verb, *how, *([str(tmp_path / "made")] if verb == "convert" else ["--max_new_tokens", "2"])]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="waits for a machine without a GPU: cuda is a device here")
@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_a_device_that_does_not_exist(device: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["generate", "--model", str(folder), "--device", device, "Bonjour ___"]) == 2
    assert capsys.readouterr().err == f"fat5 generate: device: no device '{device}' here. Use auto or cpu\n"


def test_a_key_of_sampling_without_sampling_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(folder), "--top_k", "5", "Bonjour ___"]) == 2
    said = "fat5 generate: top_k: acts in sampling only. Add --sample, or leave it out\n"
    assert capsys.readouterr().err.endswith(said)
