"""Reads a model's weights: `load_model`, the choice of files, and one clear error for a damaged or unsafe one."""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from fat5.errors import CheckpointError, CheckpointFileError, ConfigurationError
from fat5.files import PICKLE_SUFFIXES, read_object
from fat5.model.flash_t5 import attention_scale, translate_tensors

# Keyword arguments of from_pretrained that say where a file is.
_PLACE = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
_AGAIN = "restore it, or save it again"
# Narrower dtypes have no infinity to find, or are quantised.
_WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_model(path: str | Path, *, device: str | torch.device = "auto", dtype: torch.dtype | str = "auto") -> Any:
    """The `FAT5ForConditionalGeneration` in a folder that FAT5 or stock transformers wrote, in evaluation mode.

    Args:
        device: "auto" is CUDA if available, else the CPU.
        dtype: of the weights; "auto" is that of the files.

    Raises:
        ConfigurationError: the device, or the library that quantised the weights, does not exist here.
        CheckpointError: the folder holds no such model, an incomplete one, or weights that are no numbers.
    """
    # It is built on what follows here.
    from fat5.model.seq2seq import FAT5ForConditionalGeneration

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA fails an assertion
        hint = "Use auto, cpu or cuda" if torch.cuda.is_available() else "Use auto or cpu"
        raise ConfigurationError(f"no device {str(device)!r} here", where="device", hint=hint) from error
    try:
        with quiet():
            model = FAT5ForConditionalGeneration.from_pretrained(path, dtype=dtype)
    except ImportError as error:  # weights quantised by a library that is not here
        raise ConfigurationError(_line(error), where=path, hint="install it, or give the model unquantised") from error
    model = model.to(device).eval()
    check_finite(model, path)
    return model


def check_finite(model: Any, where: object) -> None:
    """Raises CheckpointError with the name of a weight that holds NaN or infinity; skips quantised weights."""
    for name, weight in model.named_parameters():
        if type(weight) is not torch.nn.Parameter or weight.is_meta or weight.dtype not in _WIDE:
            continue
        # One pass without a mask: both extremes are NaN if any value is.
        least, largest = weight.detach().aminmax()
        if not bool(least.isfinite() & largest.isfinite()):
            wider = ", or load it in a wider dtype" if weight.dtype == torch.float16 else ""
            raise CheckpointError(
                f"{name} holds NaN or infinity",
                where=where,
                hint=f"Take a checkpoint from before training broke down{wider}",
            )


@contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Inside, transformers prints no warnings, and no progress bars unless `bars`: they would break a log."""
    level, drew = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if drew:
            logging.enable_progress_bar()


def weight_source(where: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of transformers' from_pretrained that make it read the weights of `where` safely.

    A folder with safetensors is read from those alone, one with pytorch_model.bin with weights_only=True. The tensors
    of a flash_t5 folder, or of one on the hub, are read here and handed over under T5's names.

    Raises:
        CheckpointError: a folder with neither, or with tensors that are not floating-point numbers; other pickles and
            adapters are refused by name.
    """
    folder = Path(where)
    if not folder.is_dir() and (folder.is_absolute() or folder.exists() or len(folder.parts) > 2):
        raise CheckpointFileError(
            "is a file" if folder.exists() else "no such folder",
            where=where,
            hint="give the folder that save_pretrained wrote",
        )
    place = {key: kwargs[key] for key in _PLACE if key in kwargs}
    on_hub = not folder.is_dir()
    if not on_hub:
        folder = folder / (place.get("subfolder") or "")
        refuse_adapter(folder)
        if kwargs.get("config") is None and not (folder / "config.json").is_file():
            raise CheckpointFileError("holds no config.json", where=folder, hint="put the model's config.json there")
        _check_settings(folder)
    found, _ = PreTrainedConfig.get_config_dict(where, **place)
    is_old = found.get("model_type") == "flash_t5"
    if on_hub:
        if not is_old:
            return {}
        subfolder = place.pop("subfolder", None) or ""
        patterns = ["*.safetensors", "*.bin", "*.json"]
        folder = Path(snapshot_download(str(where), allow_patterns=patterns, **place)) / subfolder
    variant = kwargs.get("variant")
    files = weight_files(folder, variant)
    if not files and variant is None:
        _refuse(folder)
    if not found.get("quantization_config"):
        for file in files:
            _check_numbers(file)
    if not is_old:
        return {"use_safetensors": not files or files[0].suffix == ".safetensors", "weights_only": True}
    tensors = translate_tensors(read_tensors(folder, variant), attention_scale(found, where), where)
    _check_form(tensors, kwargs, where)
    return {"state_dict": tensors, "config": kwargs.get("config") or str(where)}


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files that transformers reads: a whole one before shards, safetensors before pickles of tensors."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        whole = folder / (f"{stem}.{variant}.{suffix}" if variant else f"{stem}.{suffix}")
        index = folder / f"{stem}.{suffix}.index.{f'{variant}.' if variant else ''}json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return [folder / name for name in sorted(set(_index(index).values()))]
    return []


def read_tensors(folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    """Every tensor of a folder, from one file or from shards."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder, variant):
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        else:
            tensors |= torch.load(file, map_location="cpu", weights_only=True)
    return tensors


def is_tied(folder: Path, says_tied: bool) -> bool:
    """Whether the output projection is the embedding: as the configuration says, unless the files hold two that differ.
    Stock configurations say "tied" of every T5.
    """
    tables: dict[str, Tensor] = {}
    for file in weight_files(folder) if says_tied else []:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                names = {"shared.weight", "lm_head.weight"} & set(opened.keys())
                tables |= {name: opened.get_tensor(name) for name in names}
        else:
            held = torch.load(file, map_location="cpu", weights_only=True)
            tables |= {name: held[name] for name in ("shared.weight", "lm_head.weight") if name in held}
    return says_tied and (len(tables) < 2 or torch.equal(*tables.values()))


def refuse_adapter(folder: Path) -> None:
    """Raises CheckpointError for a folder with a PEFT adapter, saying how to merge it with its base model."""
    if not (folder / "adapter_config.json").is_file():
        return
    classes = "import fat5, peft; peft.AutoPeftModelForSeq2SeqLM"
    raise CheckpointError(
        "holds an adapter of PEFT, which needs its base model",
        where=folder,
        hint=f"merge the two: python -c \"{classes}.from_pretrained('{folder}').merge_and_unload()"
        ".save_pretrained('MERGED')\"",
    )


def generation_settings(where: Any, kwargs: dict[str, Any]) -> GenerationConfig | None:
    """The generation_config.json beside those weights; None if there is none."""
    try:
        return GenerationConfig.from_pretrained(where, **{key: kwargs[key] for key in _PLACE if key in kwargs})
    except OSError:
        return None


@contextmanager
def readable(where: Any) -> Iterator[None]:
    """Inside, every error of the libraries about a damaged or missing file becomes one CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except ConfigurationError as error:
        raise ConfigurationError(str(error), where=where) from error
    except OSError as error:
        raise CheckpointFileError(_line(error), where=where) from error
    except StrictDataclassError as error:
        raise CheckpointError(f"config.json cannot be used: {_line(error, -1)}", where=where, hint=_AGAIN) from error
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, EOFError) as error:
        raise CheckpointFileError(f"damaged: {_line(error)}", where=where, hint=_AGAIN) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{_binary(where)} is a pickle that holds more than tensors, which can run code when read, and is refused",
            where=where,
            hint="save it again as safetensors (model.save_pretrained of transformers does)",
        ) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise CheckpointError(
                "needs more memory than there is", where=where, hint="check the sizes in its config.json"
            ) from error
        if not any(part in str(error) for part in ("PytorchStreamReader", "unexpected EOF")):
            raise
        raise CheckpointFileError(f"damaged: {_binary(where)}: {_line(error)}", where=where, hint=_AGAIN) from error


def _check_settings(folder: Path) -> None:
    """Raises CheckpointError where transformers would raise errors of many kinds for a folder's settings."""
    for path in (folder / "config.json", folder / "generation_config.json"):
        if path.is_file():
            read_object(path, CheckpointFileError, _AGAIN)
    if path.is_file():
        try:
            GenerationConfig.from_pretrained(folder)
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"cannot be used: {_line(error)}", where=path, hint=_AGAIN) from error


def _index(path: Path) -> dict[str, str]:
    """Tensor → file, from the index of a checkpoint in shards."""
    named = read_object(path, CheckpointFileError, _AGAIN).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise CheckpointFileError("damaged: names no file for each tensor", where=path, hint=_AGAIN)
    outside = sorted(file for file in set(named.values()) if Path(file).name != file)
    if outside:
        raise CheckpointError(f"names {outside[0]!r}, which is not in its folder", where=path, hint=_AGAIN)
    return named


def _check_numbers(file: Path) -> None:
    """Raises CheckpointError unless a file holds floating-point tensors by name; reads headers, not weights."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        others = [name for name, kind in kinds.items() if not kind.startswith(("F", "BF"))]
    else:
        held = torch.load(file, map_location="meta", weights_only=True)
        if not isinstance(held, dict):
            raise CheckpointError("holds no names with tensors", where=file, hint=_AGAIN)
        named = [str(name) for name, value in held.items() if not isinstance(value, Tensor)]
        if named:
            raise CheckpointError(
                f"holds {', '.join(named[:3])} beside or around its tensors, as a checkpoint of a training run does",
                where=file,
                hint="load it where it was made, and save the model in it with save_pretrained",
            )
        kinds = {str(name): str(value.dtype) for name, value in held.items()}
        others = [name for name, value in held.items() if not value.is_floating_point()]
    if others:
        raise CheckpointError(
            f"{others[0]} holds {kinds[others[0]]}, and weights are floating-point numbers",
            where=file,
            hint=_AGAIN,
        )


def _check_form(tensors: dict[str, Tensor], kwargs: dict[str, Any], where: Any) -> None:
    """Raises CheckpointError for a flash_t5 question-answering head on a decoder, as its first versions had."""
    answers = "qa_outputs.weight" in tensors and any(name.startswith("decoder.") for name in tensors)
    form = kwargs.get("head_form") or getattr(kwargs.get("config"), "head_form", None)
    if answers and form != "encoder-decoder":
        raise CheckpointError(
            "holds a question-answering head that reads a decoder",
            where=where,
            hint="load it with head_form='encoder-decoder'",
        )


def _refuse(folder: Path) -> None:
    pickles = sorted(path for path in folder.glob("*") if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            "is a pickle, which can run code when read, and is refused",
            where=pickles[0],
            hint="save it again as safetensors (model.save_pretrained of transformers does)",
        )
    raise CheckpointFileError(
        "holds no model.safetensors and no pytorch_model.bin",
        where=folder,
        hint="give the folder that save_pretrained wrote",
    )


def _binary(where: Any) -> str:
    found = sorted(Path(where).glob("*.bin"))
    return found[0].name if len(found) == 1 else "one of its .bin files"


def _line(error: BaseException, number: int = 0) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[number].strip().rstrip(".")
