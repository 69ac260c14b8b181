"""Sizes that `fat5 finetune` leaves open, and the shapes of a batch, from the lengths of the examples."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fat5.data import BatchConfig
from fat5.data.examples.config import BUDGET_MULTIPLE, rounded_up
from fat5.data.examples.packing import pack
from fat5.errors import ConfigurationError
from fat5.files import is_count
from fat5.tasks.finetune.config import FinetuneConfig
from fat5.tasks.finetune.examples import ExampleSet
from fat5.tasks.finetune.splits import Split
from fat5.train.run_directory import RunDirectory
from fat5.train.world import World
from fat5.yaml_text import read_yaml

LARGEST_PACK, LARGEST_PACK_CPU = 16_384, 4_096
"""Encoder tokens of a pack; a larger step has several."""

FEWEST_TOKENS_AN_EXAMPLE = 16
"""A pack has room for one example a this many tokens."""

SAMPLE = 4096
"""Examples that are packed to see how full packs become; fewer are repeated."""


def choose_sizes(
    config: FinetuneConfig, form: Any, train: Split, others: Sequence[Split], world: World
) -> tuple[FinetuneConfig, BatchConfig]:
    """The configuration without `auto`, and the shapes of a batch, whose packs the processes of a world share.

    Raises:
        ConfigurationError: encoder_tokens is no multiple of 128, or a step has too few packs for the processes.
    """
    data, gpu = config.data, world.device.type == "cuda"
    lengths = train.examples.input_lengths
    longest = max(int(split.examples.input_lengths.max()) for split in (train, *others))
    rest = [split.examples for split in others]

    def tokens_wanted(encoder: int) -> float:
        """Encoder tokens of a step in packs of this size."""
        room = encoder / examples_a_step(batch_config(form, train.examples, rest, encoder, 1), train.examples)
        return data.batch_size * room

    encoder = data.encoder_tokens
    if encoder == "auto":
        encoder = _earlier(config)
    if encoder == "auto":
        largest = LARGEST_PACK if gpu else LARGEST_PACK_CPU
        wanted = data.batch_size * float(lengths.mean())
        for _ in range(2):  # how full packs become depends on their size
            packs = world.size * max(1, int(np.ceil(wanted / (world.size * largest))))
            encoder = max(rounded_up(longest), BUDGET_MULTIPLE * round(wanted / packs / BUDGET_MULTIPLE))
            wanted = tokens_wanted(encoder)
        while _packs(wanted, encoder) % world.size and encoder - BUDGET_MULTIPLE >= longest:
            encoder -= BUDGET_MULTIPLE
            wanted = tokens_wanted(encoder)
    elif encoder % BUDGET_MULTIPLE:
        raise ConfigurationError(
            f"must be a multiple of {BUDGET_MULTIPLE}, not {encoder}", where="data.encoder_tokens",
            hint=f"Try {rounded_up(encoder)}",
        )  # fmt: skip
    elif longest > encoder:
        raise ConfigurationError(
            f"a pack of {encoder:,} tokens has no room for the longest example, which has {longest:,}",
            where="data.encoder_tokens", hint=f"Raise it to {rounded_up(longest)}, or lower data.max_source_tokens",
        )  # fmt: skip
    wanted = tokens_wanted(encoder)
    packs = _packs(wanted, encoder)
    if packs % world.size:
        least = int(np.ceil(data.batch_size * encoder * world.size * -(-packs // world.size) / wanted))
        raise ConfigurationError(
            f"{data.batch_size} examples make {packs} pack{'s' * (packs > 1)} of {encoder:,} tokens, which "
            f"{world.size} processes cannot share",
            where="data.batch_size",
            hint=f"Try {least}, or start another number of processes",
        )
    batch = batch_config(form, train.examples, rest, encoder, packs)
    a_step = examples_a_step(batch, train.examples)
    steps = config.steps
    if steps == "auto":
        steps = max(1, round(config.epochs * len(lengths) / a_step))
    every = config.eval_every
    if every == "auto":
        passes = max(1, round(steps * a_step / len(lengths)))
        every = math.ceil(steps / passes)  # no evaluation shortly before the last one
    save = every if config.save_every == "auto" else config.save_every
    workers = (2 if gpu else 0) if data.num_workers == "auto" else data.num_workers
    data = replace(data, encoder_tokens=encoder, num_workers=workers)
    config = replace(config, data=data, steps=steps, eval_every=every, save_every=save)
    return replace(config, schedule=config.schedule.resolved(steps)), batch


def _packs(wanted: float, encoder: int) -> int:
    """Packs of a step of `wanted` encoder tokens."""
    return max(1, round(wanted / encoder))


def _earlier(config: FinetuneConfig) -> Any:
    """encoder_tokens of the run that is continued, perhaps under another number of processes; else auto."""
    run = RunDirectory(config.output_dir)
    if config.resume != "auto" or not run.holds_run or not run.config.exists():
        return "auto"
    data = read_yaml(run.config, run.config).get("data")
    given = data.get("encoder_tokens") if isinstance(data, dict) else None
    return given if is_count(given) and given > 0 and given % BUDGET_MULTIPLE == 0 else "auto"


def batch_config(form: Any, train: ExampleSet, others: Sequence[ExampleSet], encoder: int, packs: int) -> BatchConfig:
    """Shapes for a form's examples: the decoder's room goes with the encoder's in the ratio of the mean lengths."""
    most = max(8, encoder // FEWEST_TOKENS_AN_EXAMPLE)
    if form.kind == "entities":
        decoder = encoder
    elif form.kind == "text":
        longest = max(int(examples.target_lengths.max()) for examples in (train, *others))
        ratio = float(train.target_lengths.mean() / train.input_lengths.mean())
        decoder = rounded_up(max(longest, 1.05 * ratio * encoder))
    else:
        decoder = rounded_up(most * (2 if form.kind == "answers" else 1))
    return BatchConfig(
        max_tokens=encoder, encoder_tokens=encoder, decoder_tokens=decoder, packs_per_step=packs, max_examples=most
    )


def examples_a_step(batch: BatchConfig, examples: ExampleSet) -> float:
    """Examples that a step takes in, on average, from packing a sample."""
    size, chosen = len(examples), np.random.default_rng(0)
    order = np.concatenate([chosen.permutation(size) for _ in range(-(-SAMPLE // size))])[:SAMPLE]
    packs = pack(
        examples.input_lengths[order], examples.target_lengths[order], batch.encoder_tokens, batch.decoder_tokens,
        window=batch.window, max_examples=batch.examples_per_pack,
    )  # fmt: skip
    # The last pack has what was left.
    a_pack = len(order) if len(packs) == 1 else (len(order) - len(packs[-1])) / (len(packs) - 1)
    return float(min(a_pack, size) * batch.packs_per_step)
