"""What a run says of itself before its first step: size, work, passes over the data, memory."""

from collections.abc import Sequence

import torch

from fat5.train.config import PretrainConfig
from fat5.train.cost.memory import GIB, MemoryPlan
from fat5.train.cost.sizes import Text

TIGHT = 0.9
"""Share of the free memory above which a plan is called tight."""


def banner(
    config: PretrainConfig,
    parameters: int,
    text: Text,
    corpora: Sequence[tuple[float, int]],
    plan: MemoryPlan,
    free: int | None,
    device: torch.device,
) -> list[str]:
    """The lines, for a configuration in which every size is chosen.

    Args:
        parameters: of the model.
        text: mean lengths of the examples.
        corpora: weight and tokens of each source.
        plan, free: memory needed and there.
    """
    data, batch = config.data, config.data.batch()
    threads = torch.get_num_threads()
    on_cpu = "1 CPU thread" if threads == 1 else f"{threads} CPU threads"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    tokens = batch.packs_per_step * (batch.encoder_tokens + batch.decoder_tokens)
    packs = "1 pack" if batch.packs_per_step == 1 else f"{batch.packs_per_step} packs"
    lines = [
        f"model   {config.model.preset}, {parameters:,} parameters, {config.model.position_encoding} positions; "
        f"{config.precision} on {where}",
        f"step    {tokens:,} tokens: {packs} of {data.encoder_tokens:,} (encoder) + {data.decoder_tokens:,} (decoder)",
        f"run     {config.steps:,} steps, {_short(tokens * config.steps)} tokens; {_passes(config, text, corpora)} "
        f"over {_short(text.tokens)} tokens of text",
        f"memory  about {plan.describe()}" + (f" of {free / GIB:.1f} GiB free" if free is not None else ""),
    ]
    if free is not None and plan.total > TIGHT * free:
        lines.append("        that is tight: with less room, lower data.encoder_tokens and data.decoder_tokens")
    return lines


def _passes(config: PretrainConfig, text: Text, corpora: Sequence[tuple[float, int]]) -> str:
    taken = text.tokens_a_step(config.data.batch()) * config.steps
    whole = sum(weight for weight, _ in corpora)
    passes = sorted(taken * weight / whole / max(tokens, 1) for weight, tokens in corpora)
    low, high = (f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in (passes[0], passes[-1]))
    return f"{low} passes" if low == high else f"{low} to {high} passes"


def _short(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"
