"""The files that hold a model's weights: which are read, how they are translated, what is said when they cannot be."""

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
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import logging

from fat5.errors import CheckpointError
from fat5.model.configuration import FAT5Config
from fat5.model.flash_t5 import translate_tensors

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Keyword arguments of from_pretrained that say where a file is.
_PLACE = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def weight_source(where: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of transformers' from_pretrained that make it read the weights of `where` safely.

    A folder with safetensors is read from those alone, one with pytorch_model.bin with weights_only=True. The tensors
    of a flash_t5 folder, or of one on the hub, are read here and handed over under T5's names.

    Raises:
        CheckpointError: a folder with neither; other pickles are refused by name.
    """
    folder = Path(where)
    config = args[0] if args else kwargs.get("config")
    if isinstance(config, str | Path):
        config = None
    if not folder.is_dir() and (folder.is_absolute() or folder.exists() or len(folder.parts) > 2):
        raise CheckpointError(
            "is a file" if folder.exists() else "no such folder",
            where=where,
            hint="give the folder that save_pretrained wrote",
        )
    if not folder.is_dir():  # a name on the hub
        config = configuration_of(where, kwargs) if config is None else config
        if getattr(config, "flash_t5_attention_scale", None) is None:
            return {}
        place = {key: kwargs[key] for key in _PLACE if key in kwargs and key != "subfolder"}
        folder = Path(snapshot_download(str(where), allow_patterns=["*.safetensors", "*.bin", "*.json"], **place))
    if kwargs.get("subfolder"):
        folder = folder / kwargs["subfolder"]
    _check_index(folder)
    named = kwargs.get("variant") is not None
    safe = any(folder.glob("*.safetensors")) or (folder / _WEIGHTS[1]).is_file()
    if not safe and not named and not any((folder / name).is_file() for name in _WEIGHTS):
        _refuse(folder)
    how: dict[str, Any] = {"use_safetensors": safe}
    if not safe:
        how["weights_only"] = True
    if config is None:
        config = configuration_of(where, kwargs)
    scale = getattr(config, "flash_t5_attention_scale", None)
    if scale is None:
        return how
    tensors = translate_tensors(_read(folder), scale)
    if "lm_head.weight" not in tensors:
        config.tie_word_embeddings = config.scale_decoder_outputs = True
    del config.flash_t5_attention_scale
    return {"state_dict": tensors, "config": config}


def generation_settings(where: Any, kwargs: dict[str, Any]) -> GenerationConfig | None:
    """What generation_config.json beside those weights says; None where there is none."""
    try:
        return GenerationConfig.from_pretrained(where, **{key: kwargs[key] for key in _PLACE if key in kwargs})
    except OSError:
        return None


def configuration_of(where: Any, kwargs: dict[str, Any]) -> FAT5Config:
    """The configuration beside the weights that from_pretrained(where, **kwargs) asks for."""
    return FAT5Config.from_pretrained(where, **{key: kwargs[key] for key in _PLACE if key in kwargs})


@contextmanager
def readable(where: Any) -> Iterator[None]:
    """Inside, what a damaged or missing file makes others raise becomes one CheckpointError."""
    again = "restore it, or save it again"
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(str(error).splitlines()[0].rstrip("."), where=where) from error
    except StrictDataclassError as error:
        raise CheckpointError(f"config.json cannot be used: {_last_line(error)}", where=where, hint=again) from error
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, EOFError) as error:
        raise CheckpointError(f"damaged: {_first_line(error)}", where=where, hint=again) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{_binary(where)} is a pickle that holds more than tensors, which can run code when read, and is refused",
            where=where,
            hint="save it again as safetensors (model.save_pretrained of transformers does)",
        ) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise CheckpointError(
                "asks for more memory than there is", where=where, hint="see to the sizes in its config.json"
            ) from error
        if not any(part in str(error) for part in ("PytorchStreamReader", "unexpected EOF")):
            raise
        raise CheckpointError(f"damaged: {_binary(where)}: {_first_line(error)}", where=where, hint=again) from error
    except (TypeError, ValueError) as error:
        if "dictionary update sequence" not in str(error):
            raise
        raise CheckpointError(f"{_binary(where)} holds no names with tensors", where=where, hint=again) from error


@contextmanager
def transformers_quiet() -> Iterator[None]:
    """Inside, transformers prints no warnings of its own: what they would tell is checked and said here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_index(folder: Path) -> None:
    """An index of shards that is JSON and yet names no file is damaged too."""
    for path in sorted(folder.glob("*.index.json")):
        content = json.loads(path.read_text())
        named = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
            raise CheckpointError("damaged: names no file for each tensor", where=path, hint="restore it")
        outside = sorted(file for file in set(named.values()) if Path(file).name != file)
        if outside:
            raise CheckpointError(f"names {outside[0]!r}, which is not in its folder", where=path, hint="restore it")


def _refuse(folder: Path) -> None:
    pickles = sorted(path for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            "is a pickle, which can run code when read, and is refused",
            where=pickles[0],
            hint="save it again as safetensors (model.save_pretrained of transformers does)",
        )
    raise CheckpointError(
        "holds no model.safetensors and no pytorch_model.bin",
        where=folder,
        hint="give the folder that save_pretrained wrote",
    )


def _read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, from one file or from shards."""
    tensors: dict[str, Tensor] = {}
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        else:
            tensors |= torch.load(file, map_location="cpu", weights_only=True)
    return tensors


def _binary(where: Any) -> str:
    found = sorted(Path(where).glob("*.bin"))
    return found[0].name if len(found) == 1 else "one of its .bin files"


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip().rstrip(".")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
