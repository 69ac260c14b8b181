"""Low-rank adaptation through PEFT: a model with adapters, and the plain model that it amounts to."""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fat5.errors import CheckpointError, CheckpointFileError, ConfigurationError
from fat5.files import read_object, whole_folder
from fat5.model import quiet
from fat5.model.loading import check_finite, readable
from fat5.tasks.finetune.config import LoraConfig
from fat5.train.checkpoint.store import model_folder

HEADS = ("classification_head", "classifier", "qa_outputs")
"""Layers that a task adds; they begin at random, so they train whole beside the adapters."""

TASK_TYPES = {
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""Class of a model → PEFT's name for its task."""

ADAPTER = "adapter_config.json"


def add_adapters(model: Any, config: LoraConfig, task: str) -> Any:
    """The model with its own weights frozen and low-rank matrices beside the layers that `config` names.

    Raises:
        ConfigurationError: PEFT is missing, or no layer has one of these names.
    """
    peft = _peft()
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = [name for name in config.targets if name in names]
    if not targets:
        raise ConfigurationError(
            f"no layer is called {', '.join(config.targets) or 'anything'}",
            where="lora.targets",
            hint="Name some of q, k, v, o, wi, wi_0, wi_1, wo",
        )
    chosen = peft.LoraConfig(
        task_type=TASK_TYPES[task],
        r=config.rank,
        lora_alpha=config.alpha if config.alpha is not None else 2 * config.rank,
        lora_dropout=config.dropout,
        target_modules=targets,
        modules_to_save=[name for name in HEADS if name in names] or None,
    )
    with _quiet():
        return peft.get_peft_model(model, chosen)


def is_adapted(model: Any) -> bool:
    """Whether a model came from `add_adapters`."""
    return hasattr(model, "merge_and_unload")


def merged(model: Any) -> Any:
    """A plain model with the adapters' products added to its weights: a copy, if there are adapters."""
    if not is_adapted(model):
        return model
    plain = copy.deepcopy(model).merge_and_unload()
    plain.requires_grad_(True)
    return plain


def write_adapter(model: Any, folder: Path, base: str) -> None:
    """Writes the adapters alone as PEFT reads them, with the name of the model they belong to."""
    with whole_folder(folder) as target, quiet():
        model.save_pretrained(target, save_embedding_layers=False)
        path = target / ADAPTER
        content = json.loads(path.read_text())
        content["base_model_name_or_path"] = base
        path.write_text(json.dumps(content, indent=1) + "\n")


def base_folder(folder: Path) -> Path:
    """The folder of the model that an adapter belongs to.

    Raises:
        CheckpointError: the adapter names none, or one that is not there.
    """
    base = read_object(folder / ADAPTER, CheckpointFileError, "Restore it").get("base_model_name_or_path")
    if base == "none":
        raise CheckpointError(
            "the adapter's base are random weights, which no folder holds", where=folder, hint="Give the run's model/"
        )
    if not isinstance(base, str) or not Path(base).is_dir():
        raise CheckpointError(
            f"the adapter's base {base!r} is no folder here", where=folder,
            hint=f"Put it there, or mend base_model_name_or_path in {ADAPTER}",
        )  # fmt: skip
    return model_folder(Path(base))


def load_adapted(cls: Any, config: Any, folder: Path, task: str) -> Any:
    """A plain model with an adapter merged into its base.

    Args:
        config: of the model, with the labels that the adapter's head was trained for.

    Raises:
        CheckpointError: the base is missing, or the adapter is damaged or of another task.
        ConfigurationError: PEFT is missing.
    """
    peft = _peft()
    base = base_folder(folder)
    kind = read_object(folder / ADAPTER, CheckpointFileError, "Restore it").get("task_type")
    if kind not in (None, TASK_TYPES[task]):
        raise CheckpointError(f"holds an adapter of {kind}, not {TASK_TYPES[task]}", where=folder, hint="Mend --task")
    if not (folder / "adapter_model.safetensors").is_file():
        raise CheckpointFileError("holds no adapter_model.safetensors", where=folder, hint="Restore it")
    with readable(folder), _quiet():
        # The adapter has the head, so that no warning of a new one is due.
        model, _ = cls.from_pretrained(base, config=config, dtype=torch.float32, output_loading_info=True)
        plain = peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    check_finite(plain, folder)
    return plain


@contextmanager
def _quiet() -> Iterator[None]:
    """As `quiet`, and PEFT's use of a property that transformers 5 renames is no news to a user."""
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigurationError(
            "low-rank adaptation needs the package peft", where="lora.rank", hint="pip install 'fat5[lora]'"
        ) from error
    return peft
