"""Loading a trained model for use."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging

from fat5.errors import ConfigurationError
from fat5.model.seq2seq import FAT5ForConditionalGeneration


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
        CheckpointError: the folder holds no such model, or an incomplete one.
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
    return model.to(device).eval()


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
