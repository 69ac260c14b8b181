"""Low-rank adaptation through PEFT: a model with adapters, and the plain model that it amounts to."""

import copy
import json
from pathlib import Path
from typing import Any

from fat5.errors import ConfigurationError
from fat5.files import whole_folder
from fat5.model import quiet
from fat5.tasks.finetune.config import LoraConfig

HEADS = ("classification_head", "classifier", "qa_outputs")
"""Layers that a task adds; they begin at random, so they train whole beside the adapters."""


def add_adapters(model: Any, config: LoraConfig, task: str) -> Any:
    """The model with its own weights frozen and low-rank matrices beside the layers that `config` names.

    Raises:
        ConfigurationError: PEFT is missing, or no layer has one of these names.
    """
    peft = _peft()
    kinds = {"ForConditionalGeneration": "SEQ_2_SEQ_LM", "ForSequenceClassification": "SEQ_CLS"}
    kinds |= {"ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS"}
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = [name for name in config.targets if name in names]
    if not targets:
        raise ConfigurationError(
            f"no layer is called {', '.join(config.targets) or 'anything'}",
            where="lora.targets",
            hint="Name some of q, k, v, o, wi, wi_0, wi_1, wo",
        )
    chosen = peft.LoraConfig(
        task_type=kinds[task],
        r=config.rank,
        lora_alpha=config.alpha if config.alpha is not None else 2 * config.rank,
        lora_dropout=config.dropout,
        target_modules=targets,
        modules_to_save=[name for name in HEADS if name in names] or None,
    )
    with quiet():
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
        path = target / "adapter_config.json"
        content = json.loads(path.read_text())
        content["base_model_name_or_path"] = base
        path.write_text(json.dumps(content, indent=1) + "\n")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigurationError(
            "low-rank adaptation needs the package peft", where="lora.rank", hint="pip install 'fat5[lora]'"
        ) from error
    return peft
