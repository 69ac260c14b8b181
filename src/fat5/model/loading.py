"""Loading a trained model for use."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from fat5.errors import CheckpointError, ConfigurationError
from fat5.model.seq2seq import FAT5ForConditionalGeneration

# Narrower ones have no infinity to find, or are quantised.
_WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_model(
    path: str | Path, *, device: str | torch.device = "auto", dtype: torch.dtype | str = "auto"
) -> FAT5ForConditionalGeneration:
    """The model in a folder that FAT5 or stock transformers wrote, in evaluation mode.

    Args:
        path: a folder with config.json and *.safetensors, of type fat5 or t5.
        device: "auto" is CUDA where there is one.
        dtype: of the weights; "auto" is the one they were saved in.

    Raises:
        ConfigurationError: the device, or the library that quantised the weights, does not exist here.
        CheckpointError: the folder holds no such model, an incomplete one, or weights that are no numbers.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ConfigurationError(f"no device {device!r}", where="device", hint="Use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("there is no CUDA device here", where="device", hint="Use cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(f"there is no {device} here", where="device", hint="Use cuda or auto")
    try:
        with quiet():
            model: FAT5ForConditionalGeneration = FAT5ForConditionalGeneration.from_pretrained(path, dtype=dtype)
    except ImportError as error:  # weights quantised by a library that is not here
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(reason, where=path, hint="install it, or give the model unquantised") from error
    model = model.to(device).eval()
    check_finite(model, path)
    return model


def check_finite(model: Any, where: object) -> None:
    """Raises CheckpointError with the name of a weight that holds NaN or infinity; quantised ones are not looked at."""
    for name, weight in model.named_parameters():
        if type(weight) is not torch.nn.Parameter or weight.is_meta or weight.dtype not in _WIDE:
            continue
        # One pass and no mask: NaN comes out as both of the extremes.
        least, largest = weight.detach().aminmax()
        if not bool(least.isfinite() & largest.isfinite()):
            wider = ", or load it in a wider dtype" if weight.dtype == torch.float16 else ""
            raise CheckpointError(
                f"{name} holds NaN or infinity",
                where=where,
                hint=f"Take a checkpoint from before training broke down{wider}",
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers draws no bars of its own, which would break a log or an error's one line."""
    drew = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drew:
            logging.enable_progress_bar()
