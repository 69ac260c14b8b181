"""What may change when a run is continued: harmless keys, keys that are warned about, and keys that are refused.

A checkpoint contains the configuration of its run and the hashes of its data. A change that would make it another run
(other data, order or model, another meaning of the optimizer state) is refused. A change that people make on purpose
in the middle of a run gets a warning. Keys that do not affect the result may change freely.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fat5.errors import CheckpointError

HARMLESS = (
    "output_dir",
    "init_from.folder",
    "init_tokenizer",
    "data.num_workers",
    "data.packs_per_micro_batch",
    "compile",
    "cuda_graphs",
    "gradient_checkpointing",
    "optimizer.offload",
    "parallel",
    "hsdp_shard_size",
    "log_every",
    "eval_every",
    "save_every",
    "keep_last",
    "keep_best",
    "keep_every",
    "on_nan",
    "on_spike",
    "spike_sigma",
    "deterministic",
    "resume",
    "strict",
    "tensorboard",
    "report_to",
    "use_best",
    "metric",
    "predict_batch",
    "num_beams",
    "max_new_tokens",
    "eval_examples",
    "seeds",
    "languages",
)
"""They do not affect the result. (Micro-batches change the order of a sum: equal within tolerance.)"""

WARNED = (
    "optimizer.lr",
    "optimizer.hidden_lr",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.momentum",
    "schedule",
    "steps",
    "gradient_clip",
    "eval_tokens",
    "epochs",
    "patience",
    "precision",
    "model.overrides.dropout_rate",
    "model.overrides.attention_dropout_rate",
    "model.overrides.z_loss",
    "model.overrides.label_smoothing",
)
"""They change how the run learns from here on. (eval_tokens: the curve before and after do not compare.)"""

_ABSENT = "(not set)"


def check_changes(before: Mapping[str, Any], after: Mapping[str, Any], where: object) -> list[str]:
    """Judges the differences between two configurations.

    Returns:
        A warning for each key that may change but alters the run.

    Raises:
        CheckpointError: a key that may not change has; each is named with both values.
    """
    old, new = dict(_flatten(before)), dict(_flatten(after))
    differing = [
        (key, old.get(key, _ABSENT), new.get(key, _ABSENT))
        for key in sorted(old.keys() | new.keys())
        if old.get(key, _ABSENT) != new.get(key, _ABSENT)
    ]
    refused = [
        (key, old, new)
        for key, old, new in differing
        if not _among(key, HARMLESS + WARNED)
        or (key == "precision" and (old == "bf16-pure") != (new == "bf16-pure"))  # the weights are of another dtype
    ]
    if refused:
        told = "; ".join(f"{key} was {old!r} and is now {new!r}" for key, old, new in refused)
        raise CheckpointError(
            f"comes from another configuration: {told}",
            where=where,
            hint="Restore these values, or start a new run in another output_dir",
        )
    return [
        f"{key} was {old!r} when the checkpoint was made and is now {new!r}"
        for key, old, new in differing
        if _among(key, WARNED)
    ]


def _among(key: str, keys: tuple[str, ...]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value), nested keys joined by dots; a key without a value is as one that is absent (of another version)."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        elif value is not None and not isinstance(value, Mapping):
            yield f"{prefix}{key}", value
