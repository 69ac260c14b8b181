"""What `fat5 convert` refuses: in one line, with nothing left. Damaged sources: tests/cli/test_bad_models.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sources import change, refused, run

from fat5.convert import ConvertConfig, conversion, convert
from fat5.errors import CheckpointError, ConfigurationError, TokenizerError
from fat5.model import configuration


def test_weights_beyond_float16_are_refused(folder: Any) -> None:
    source = folder("v1.1")
    change(source, "encoder.final_layer_norm.weight", lambda x: x * 1e6)
    refused(source, CheckpointError, r"final_layer_norm\.weight holds .* which float16 cannot", dtype="float16")


def test_other_classes_and_no_folder(folder: Any, tmp_path: Path) -> None:
    source = folder("v1.1")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["T5ForDreams"]}))
    refused(source, CheckpointError, "holds a T5ForDreams")
    refused(tmp_path / "nowhere", CheckpointError, "does not exist")


def test_a_tokenizer_larger_than_the_vocabulary(folder: Any, tokenizer: Path) -> None:
    source = folder("ByT5")
    (source / "tokenizer_config.json").unlink()
    refused(source, TokenizerError, r"has 1,024 tokens, and the model only 384", tokenizer=str(tokenizer))
    refused(source, TokenizerError, "holds no tokenizer, whose tokens ctranslate2 needs", to="ctranslate2")
    report = run(source, "hf")
    assert any("no tokenizer" in note for note in report.notes)


def test_keys_that_cannot_be(folder: Any, tmp_path: Path) -> None:
    source = folder("v1.1")
    refused(source, ConfigurationError, "only ctranslate2 quantizes", quantization="int8")
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
