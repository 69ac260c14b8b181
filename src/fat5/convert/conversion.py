"""`convert(config)`: copies a T5-family model into another format, verifies the copy, and writes all of it or nothing.

source.py               the folder to convert: FAT5, stock T5, mT5, umT5, ByT5, or the first FAT5 (flash_t5)
conversion.py           this file: the steps, and the formats hf and fat5
ctranslate2.py, onnx.py the other two formats
verification.py         runs the same examples through both; above the tolerance nothing is written
flash_t5_formulas.py    the first FAT5's model in float64, to compare with
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fat5.convert import ConvertConfig
from fat5.convert.flash_t5_formulas import FORMULAS_TOLERANCE, FlashT5Formulas
from fat5.convert.source import (
    STOCK_PREFIX,
    TOKENIZER_FILES,
    SourceModel,
    is_named_unigram,
    load_stock,
    load_stock_tokenizer,
    read_source,
)
from fat5.convert.verification import TOLERANCE, Comparison, compare, outputs, random_examples
from fat5.errors import CheckpointError, ConfigurationError, FAT5Error, TokenizerError
from fat5.files import whole_folder
from fat5.model import quiet
from fat5.model.card import CARD, PLOT, CardFacts, read_card, write_card
from fat5.model.loading import check_finite

# Packages of each format that come with an extra of the same name.
PACKAGES = {"ctranslate2": ("ctranslate2",), "onnx": ("onnx", "onnxscript", "onnxruntime")}


@dataclass
class Conversion:
    """The report of a conversion: numbers of parameters and tensors written, and the bytes of each file."""

    source: Path
    target: Path
    kind: str
    parameters: int
    tensors: int
    compared: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        return [
            f"converted   {self.source} ({self.kind}) to {self.target}",
            f"parameters  {self.parameters:,} in {self.tensors} tensors",
            *(
                f"verified    {one.what}: largest difference {one.difference:.1e} of the largest value, tolerance "
                f"{one.tolerance:.0e}"
                for one in self.compared
            ),
            *(f"note        {note}" for note in self.notes),
            *(f"file        {name}  {size:,} bytes" for name, size in sorted(self.files.items())),
        ]


def convert(config: ConvertConfig) -> Conversion:
    """Converts a model and verifies the copy.

    Raises:
        ConfigurationError: invalid keys, a format that cannot express the model, a missing package.
        CheckpointError, TokenizerError: a source that is missing, damaged or unsafe; a copy that differs.
    """
    _check(config)
    source = read_source(config.model, config.tokenizer)
    _check_expressible(source, config.to)
    stored = _stored_dtype(source, config)
    model = source.load(encoder_only=config.to == "onnx")
    check_finite(model, source.folder)
    kind = "EncoderModel" if config.to == "onnx" else source.kind
    report = Conversion(
        source.folder,
        Path(config.output_dir),
        f"{source.model_type}, {type(model).__name__}, {str(stored).removeprefix('torch.')}",
        model.num_parameters(),
        len(list(model.parameters())),
    )
    examples = random_examples(model.config, config.seed)
    report.compared += _verify_source(source, model, kind, examples)
    for comparison in report.compared:  # before the copy, which takes longer
        comparison.require(source.folder)
    _round(model, stored, kind, examples, report)
    with _folder(report.target) as partial:
        if config.to == "onnx":
            from fat5.convert.onnx import verify_onnx, write_onnx

            write_onnx(model, partial)
            report.compared.append(verify_onnx(partial, model, examples))
        elif config.to == "ctranslate2":
            from fat5.convert.ctranslate2 import convert_ctranslate2

            plain, made = partial / "plain", partial / "made"
            _save(model, stored, plain)
            assert source.tokenizer is not None, "_check_expressible"
            _copy_tokenizer(source.tokenizer, plain)
            convert_ctranslate2(plain, made, model, examples, stored, config.quantization, report)
            shutil.rmtree(plain)
            for file in made.iterdir():
                file.rename(partial / file.name)
            made.rmdir()
        else:
            _save(model, stored, partial)
            report.compared.append(_verify_folder(partial, source, model, config.to, examples))
        for comparison in report.compared:
            comparison.require(source.folder)
        if source.tokenizer is None:
            report.notes.append(
                "the source holds no tokenizer, so neither does the copy; give one with --tokenizer DIR"
            )
        else:
            _copy_tokenizer(source.tokenizer, partial)
            _verify_tokenizer(source.tokenizer, partial, source, report)
        _write_card(partial, source, config, report)
        report.files = {
            str(file.relative_to(partial)): file.stat().st_size for file in partial.rglob("*") if file.is_file()
        }
    return report


def _check(config: ConvertConfig) -> None:
    target, to = Path(config.output_dir), config.to
    missing = [package for package in PACKAGES.get(to, ()) if find_spec(package) is None]
    for is_wrong, what, where, hint in (
        (not config.model, "no model", None, "Say which: fat5 convert DIR --output_dir NEW --to hf"),
        (not config.output_dir, "is not given", "output_dir", "Say where the copy goes: --output_dir NEW"),
        (not 0 <= config.seed < 1 << 63, f"{config.seed} is not from 0 up to 2^63 - 1", "seed", None),
        (target.is_symlink() or target.exists(), "exists", target, "Choose a new --output_dir, or remove this one"),
        (
            config.quantization and to != "ctranslate2",
            f"only ctranslate2 quantizes, not {to}", "quantization", "Use dtype",
        ),
        (
            to == "onnx" and config.dtype not in ("auto", "float32"),
            f"onnx is written in float32, not {config.dtype}", "dtype", "Leave it out",
        ),
        (
            missing, f"--to {to} needs {' and '.join(missing)}, not installed here", None,
            f"pip install 'fat5[{to}]'",
        ),
    ):  # fmt: skip
        if is_wrong:
            raise ConfigurationError(what, where=where, hint=hint)


def _check_expressible(source: SourceModel, to: str) -> None:
    """Raises ConfigurationError if the format cannot express the model."""
    positions, to_ctranslate2 = source.config.position_encoding, to == "ctranslate2"
    for is_wrong, what, use in (
        (
            to in ("hf", "ctranslate2") and positions != "t5",
            f"{positions} positions: {to} has T5's only", "fat5 or onnx",
        ),
        (
            to_ctranslate2 and source.kind != "ForConditionalGeneration",
            f"a T5{source.kind}: ctranslate2 takes encoder-decoders with a language-model head", "hf or onnx",
        ),
        (
            to_ctranslate2 and source.config.family == "umt5",
            "umT5: ctranslate2 has no bias table in every layer", "hf or onnx",
        ),
    ):  # fmt: skip
        if is_wrong:
            raise ConfigurationError(what, where=source.folder, hint=f"Use --to {use}")
    if to_ctranslate2 and source.tokenizer is None:
        raise TokenizerError(
            "holds no tokenizer, whose tokens ctranslate2 needs", where=source.folder, hint="Give --tokenizer DIR"
        )


def _stored_dtype(source: SourceModel, config: ConvertConfig) -> torch.dtype:
    if config.to == "onnx":
        return torch.float32
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    found = source.config.dtype
    return found if found in (torch.bfloat16, torch.float16) else torch.float32


def _round(model: Any, stored: torch.dtype, kind: str, examples: dict[str, Any], report: Conversion) -> None:
    """Rounds the weights to the stored dtype and notes the effect on outputs; the model stays in float32."""
    if stored == torch.float32:
        return
    before = outputs(model, kind, examples)
    largest, name = 0.0, str(stored).removeprefix("torch.")
    for key, parameter in model.named_parameters():
        rounded = parameter.data.to(stored)
        if not bool(rounded.isfinite().all()):
            raise CheckpointError(
                f"{key} holds {float(parameter.data.abs().max()):.3g}, which {name} cannot",
                where=report.source,
                hint="Use --dtype bfloat16 or float32",
            )
        largest = max(largest, float((rounded.float() - parameter.data).abs().max()))
        parameter.data = rounded.float()
    if largest > 0.0:
        moved = compare(outputs(model, kind, examples), before, "").difference
        report.notes.append(f"rounding the weights to {name} moves outputs by {moved:.1e} of the largest")


def _save(model: Any, stored: torch.dtype, folder: Path) -> None:
    """Calls save_pretrained in the stored dtype; the model is float32 again afterwards."""
    with quiet():
        for parameter in model.parameters():
            parameter.data = parameter.data.to(stored)
        model.config.dtype = stored
        model.save_pretrained(folder)
        for parameter in model.parameters():
            parameter.data = parameter.data.float()


def _verify_source(source: SourceModel, model: Any, kind: str, examples: dict[str, Any]) -> list[Comparison]:
    """Compares the source read by FAT5 with the source read by code that shares no translation with FAT5."""
    other: Any
    if source.model_type == "flash_t5":
        who, other = "the first FAT5's formulas and FAT5 on the source", FlashT5Formulas.of_folder(source.folder, kind)
        return [_compare_outputs(model, other, kind, examples, who, FORMULAS_TOLERANCE)]
    if source.model_type in STOCK_PREFIX:
        who, other = "stock transformers and FAT5 on the source", load_stock(source.folder, kind)
        return [_compare_outputs(model, other, kind, examples, who)]
    return []


def _verify_folder(folder: Path, source: SourceModel, model: Any, to: str, examples: dict[str, Any]) -> Comparison:
    """Compares the copy with the source; stock transformers reads a copy made for it."""
    if to == "fat5":
        copy, reader = replace(source, folder=folder).load(), "FAT5"
    elif _stock_reads(folder):
        copy, reader = load_stock(folder, source.kind), "stock transformers"
    else:
        raise ConfigurationError(
            "no class of stock transformers computes what this model does",
            where=source.folder,
            hint="Use --to fat5",
        )
    return _compare_outputs(copy, model, source.kind, examples, f"{reader} on the copy, FAT5 on the source")


def _compare_outputs(
    got: Any, want: Any, kind: str, examples: dict[str, Any], who: str, tolerance: float = TOLERANCE
) -> Comparison:
    rows, tokens = len(examples["input_ids"]), int(examples["attention_mask"].sum())
    what = f"outputs for {rows} examples of {tokens} tokens ({who})"
    return compare(outputs(got, kind, examples), outputs(want, kind, examples), what, tolerance)


def _stock_reads(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text()).get("model_type", "t5") in STOCK_PREFIX


def _copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    for name in {*TOKENIZER_FILES, *load_stock_tokenizer(tokenizer).vocab_files_names.values()}:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    if is_named_unigram(folder):
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n")


def _verify_tokenizer(tokenizer: Path, folder: Path, source: SourceModel, report: Conversion) -> None:
    """Checks that stock transformers encodes some texts alike with both tokenizers, and notes it."""
    texts = ["Le noyau Linux est libre. 3 < 4, œuf & naïveté; déjà 42 %!", "[R] Un<extra_id_0> paquet", "日本語 ½ \t x"]
    before, after = (load_stock_tokenizer(where)(texts)["input_ids"] for where in (tokenizer, folder))
    if before != after:
        raise TokenizerError("the copy encodes text differently; nothing was written", where=tokenizer)
    report.notes.append(f"the tokenizer encodes {len(texts)} texts to the same {sum(map(len, after))} tokens")
    if source.model_type == "flash_t5":
        read = load_stock_tokenizer(tokenizer)
        sentinels = [token for token in read.all_special_tokens if "extra" in token]
        first = max(sentinels, key=read.convert_tokens_to_ids, default="<extra_id_0>")
        if first != "<extra_id_0>":
            report.notes.append(
                f"the first FAT5 counted sentinels down from the highest id: the first blank is {first}"
            )


def _write_card(folder: Path, source: SourceModel, config: ConvertConfig, report: Conversion) -> None:
    found = read_card(source.folder)
    if found.get("training") and (source.folder / PLOT).is_file():
        shutil.copyfile(source.folder / PLOT, folder / PLOT)
    if found.get("source_card"):
        shutil.copyfile(source.folder / CARD, folder / "SOURCE_README.md")
    facts = CardFacts(
        name=Path(config.output_dir).name,
        kind=source.kind,
        config=source.config,
        parameters=report.parameters,
        target="hf" if config.to == "fat5" and _stock_reads(folder) else config.to,
        conversion=report.lines()[1:],
        converted_from=source.folder.name if source.folder.name != "model" else source.folder.parent.name,
        tokenizer=source.tokenizer is not None,
        **found,
    )
    facts.license = config.license or facts.license
    write_card(folder, facts)


@contextmanager
def _folder(target: Path) -> Iterator[Path]:
    """`whole_folder`, whose faults become a ConfigurationError."""
    try:
        with whole_folder(target) as partial:
            yield partial
    except FAT5Error:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ConfigurationError(
            f"cannot be written ({reason})", where=target, hint="Make room, or choose another --output_dir"
        ) from error
