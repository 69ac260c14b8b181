"""A run's state as plain tensors and JSON, and back: counts, weights, optimizer, random generators."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fat5.errors import CheckpointError
from fat5.files import is_count, is_number, read_object
from fat5.optim import OffloadedOptimizer, skips_on_device
from fat5.optim.registry import Named
from fat5.train.checkpoint.files import read_tensors
from fat5.train.checkpoint.generators import RandomState, rng_files
from fat5.train.log.metrics import is_row
from fat5.train.parts import local, own_part, whole, whole_shape

WEIGHTS, OPTIMIZER, OPTIMIZER_FACTS, TRAINER = (
    "model.safetensors",
    "optimizer.safetensors",
    "optimizer.json",
    "trainer.json",
)

LATER = ("best_rank", "best_step", "worse_in_a_row", "stopped_early", "losses", "loss_mean", "loss_variance")
"""Of the progress; checkpoints of earlier versions lack them."""


@dataclass
class RunState:
    """How far a run is; part of each checkpoint, as `progress` in trainer.json."""

    step: int = 0
    tokens: int = 0
    """Encoder and decoder tokens trained on"""
    raw_tokens: int = 0
    """Tokens of text trained on"""
    encoder_tokens: int = 0
    decoder_tokens: int = 0
    encoder_room: int = 0
    decoder_room: int = 0
    seconds: float = 0.0
    """Wall time of all parts of the run"""
    step_seconds: float = 0.0
    """The part of it spent in steps"""
    broken_in_a_row: int = 0
    evaluated_at: int = -1
    """Step of the last evaluation"""
    first_evaluation: dict[str, Any] | None = None
    last_evaluation: dict[str, Any] | None = None
    best_rank: float | None = None
    """The best evaluation's number (lower is better), and its step"""
    best_step: int = -1
    worse_in_a_row: int = 0
    """Evaluations since the best"""
    stopped_early: bool = False
    losses: int = 0
    """Of steps in the two below"""
    loss_mean: float = 0.0
    """Exponential mean and variance of the training loss (guards.py)"""
    loss_variance: float = 0.0

    def note_rank(self, rank: float, patience: int | None) -> None:
        """Takes in an evaluation's number, and decides whether the run ends."""
        if rank == rank and (self.best_rank is None or rank < self.best_rank):
            self.best_rank, self.best_step, self.worse_in_a_row = rank, self.step, 0
        else:
            self.worse_in_a_row += 1
        self.stopped_early = patience is not None and self.worse_in_a_row >= patience

    def restore(self, saved: Mapping[str, Any], where: Path) -> None:
        """Takes over the numbers of a checkpoint.

        Raises:
            CheckpointError: one is missing, or of another type.
        """
        for item in fields(self):
            value = saved.get(item.name, item.default if item.name in LATER else None)
            if item.name.endswith("_evaluation"):
                fits = value is None or is_row(value)
            elif item.name == "best_rank":
                fits = value is None or is_number(value)
            elif item.type is bool:
                fits = isinstance(value, bool)
            elif item.type is float:
                fits = is_number(value)
            else:
                fits = is_count(value) or (value == -1 and item.name in ("evaluated_at", "best_step"))
            if not fits:
                raise CheckpointError(f"progress.{item.name} is {str(value)[:60]!r}", where=where)
            setattr(self, item.name, value)


def capture(
    model: nn.Module, named: Named, optimizer: torch.optim.Optimizer, random_states: Sequence[RandomState], keep: bool
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """The state of model, optimizer and random generators: file name → tensors, and file name → text.

    Args:
        random_states: of every process, by rank.
        keep: False in a process that only gives its parts to the others: its tensors stay where they are.
    """
    moments, numbers = capture_optimizer(optimizer, named, keep)
    tensors = {WEIGHTS: capture_weights(model, keep), OPTIMIZER: moments}
    texts = {OPTIMIZER_FACTS: to_text(numbers)}
    for rank, (words, facts) in enumerate(random_states):
        tensor_file, fact_file = rng_files(rank)
        tensors[tensor_file], texts[fact_file] = words, to_text(facts)
    return tensors, texts


def restore(model: nn.Module, named: Named, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Puts captured weights and optimizer back.

    Raises:
        CheckpointError: they are of another model, or not a state at all.
    """
    restore_weights(model, folder)
    restore_optimizer(optimizer, named, folder)


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """The trainer's own part of a checkpoint: progress, data, loss_scale and configuration, each a mapping.

    Raises:
        CheckpointError: missing, or something else.
    """
    content = read_object(folder / TRAINER, CheckpointError)
    for key in ("progress", "data", "loss_scale", "configuration"):
        if not isinstance(content.get(key), dict):
            raise CheckpointError(f"has no {key}", where=folder / TRAINER)
    return content


def to_text(content: Mapping[str, Any]) -> str:
    """JSON for a checkpoint; keys in order, so that equal states give equal bytes."""
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def capture_weights(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Host copies of the model's weights under their names; a tied weight once, under its first name.

    Weights that processes divide are gathered one by one: all processes call it, and one keeps them.
    """
    whole_ones = ((name, whole(weight)) for name, weight in unique_weights(model))
    return {name: _copy(weight) for name, weight in whole_ones if keep}


def unique_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, each storage once."""
    seen = set()
    for name, weight in model.state_dict().items():
        address = local(weight).data_ptr()
        if address not in seen or weight.numel() == 0:
            seen.add(address)
            yield name, weight


def restore_weights(model: nn.Module, folder: Path) -> None:
    """Fills the model from a checkpoint.

    Raises:
        CheckpointError: other names, shapes or dtypes than the model's.
    """
    saved = read_tensors(folder / WEIGHTS)
    own = dict(unique_weights(model))
    if saved.keys() != own.keys():
        odd = sorted(saved.keys() ^ own.keys())
        raise CheckpointError(f"belongs to another model: {odd[0]} is in only one of them", where=folder / WEIGHTS)
    for name, weight in own.items():
        if saved[name].shape != weight.shape or saved[name].dtype != weight.dtype:
            raise CheckpointError(
                f"belongs to another model: {name} is {tuple(saved[name].shape)} {saved[name].dtype} there and "
                f"{tuple(weight.shape)} {weight.dtype} here",
                where=folder / WEIGHTS,
            )
    with torch.no_grad():
        for name, weight in own.items():
            local(weight).copy_(own_part(weight, saved[name]))


def capture_optimizer(
    optimizer: torch.optim.Optimizer, model: Named, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Host copies of the moments as ``key/weight name``, and the numbers that are no tensors."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, weight in model.named_parameters():
        for key, value in optimizer.state[weight].items() if weight in optimizer.state else ():
            if isinstance(value, Tensor):
                gathered = whole(value, weight)
                if keep:
                    tensors[f"{key}/{name}"] = _copy(gathered)
            else:
                numbers.setdefault(name, {})[key] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return tensors, {"numbers": numbers, "groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, model: Named, folder: Path) -> None:
    """Fills a freshly built optimizer; its learning rate and other settings stay those of the configuration.

    Raises:
        CheckpointError: moments of a weight that the model does not have, or of another shape.
    """
    tensors, (all_numbers, groups) = read_tensors(folder / OPTIMIZER), _read_facts(folder / OPTIMIZER_FACTS)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for label, tensor in tensors.items():
        key, _, name = label.partition("/")
        if name not in weights:
            raise CheckpointError(f"belongs to another model: no weight {name}", where=folder / OPTIMIZER)
        weight = weights[name]
        if tensor.shape != _state_shape(key, weight) or not tensor.is_floating_point():
            raise CheckpointError(
                f"belongs to another model: {label} differs, being {tuple(tensor.shape)} {tensor.dtype}",
                where=folder / OPTIMIZER,
            )
        # Counts live beside the weight only where the whole step does; elsewhere the host reads them.
        offloads = isinstance(optimizer, OffloadedOptimizer)
        on_host = offloads if tensor.ndim else not skips_on_device(optimizer)
        part = own_part(weight, tensor)
        part = part if part is tensor else part.clone()  # not a view that keeps the whole
        optimizer.state[weight][key] = part.to("cpu" if on_host else weight.device)
    if not all_numbers.keys() <= weights.keys() or len(groups) > len(optimizer.param_groups):
        raise CheckpointError("belongs to another model", where=folder / OPTIMIZER_FACTS)
    for name, numbers in all_numbers.items():
        optimizer.state[weights[name]].update(numbers)
    for group, saved in zip(optimizer.param_groups, groups):  # older ones have no group of bias tables
        group.update({key: value for key, value in saved.items() if key not in group})


def _state_shape(key: str, weight: Tensor) -> torch.Size:
    """What is kept of a weight has its shape, but for single numbers, and the rows and columns of Adafactor."""
    shape = list(whole_shape(weight))
    if key in ("step", "weight_norm", "adam_norm", "trust_ratio"):
        shape = []
    elif key in ("row_var", "col_var") and weight.ndim > 1:
        shape[-1 if key == "row_var" else -2] = 1
    return torch.Size(shape)


def _read_facts(path: Path) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The numbers of each weight, and the settings of each group."""
    facts = read_object(path, CheckpointError)
    numbers, groups = facts.get("numbers"), facts.get("groups")
    if isinstance(numbers, dict) and isinstance(groups, list):
        rows: list[Any] = list(numbers.values())
        if (
            all(isinstance(row, dict) for row in [*rows, *groups])
            and all(is_number(value) for row in rows for value in row.values())
            and all(is_count(group.get("step", 0)) for group in groups)
        ):
            return numbers, groups
    raise CheckpointError("is not the state of an optimizer", where=path)


def _copy(tensor: Tensor) -> Tensor:
    """A contiguous host copy that later training cannot reach."""
    return tensor.detach().to("cpu", copy=True).contiguous()
