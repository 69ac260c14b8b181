"""What a pretraining recipe takes on devices that need not be here: arithmetic, speed and duration."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fat5.data import TokenizerInfo
from fat5.errors import ConfigurationError, FAT5Error
from fat5.launch import Launch
from fat5.machine import GIB, free_memory
from fat5.model import FAT5Config
from fat5.tasks.config import PretrainConfig, SourceConfig
from fat5.tasks.sizes import TYPICAL_FILL, WEB_PAGES, configure_model, on_meta, settle
from fat5.train.config import AUTO, PrecisionName, shard_size
from fat5.train.cost.flops import SHEETS, Sheet, sheet_of, training_flops
from fat5.train.cost.memory import Weights, plan_memory
from fat5.train.cost.speed import NODE, measured_run, step_seconds
from fat5.train.world import World, training_device

KNOWN = {
    ("H200", "fat5-small"): (737_420, (32768, 32768, 1024)),
    ("H200", "fat5-base"): (429_200, (16384, 11776, 1024)),
    ("H200", "fat5-large"): (143_900, (32768, 32768, 1024)),
}
"""Measured useful tokens/s of one GPU, bf16 and compiled, with encoder, decoder and longest document's tokens of a pack
(benchmarks/results/h200-profile.csv; fat5-base: `fat5 pretrain` on web pages)."""

WITHOUT_BF16 = ("V100", "T4")

TOKENS_A_PARAMETER = 20
"""Of a model whose loss is lowest for its operations: 8.0B tokens for 400M parameters, 20.2B for 1B, 205B for 10B
(Hoffmann et al. 2022, table 3, for decoders; docs/doctor.md has what is known of encoder-decoders)."""

MEASURED_PRESETS = ("fat5-small", "fat5-base", "fat5-large")


@dataclass(frozen=True)
class PlannedWorld(World):
    """Processes that are not there; `rank` 0 speaks for all."""

    name: str = "this device"
    """Of each device"""
    sheet: Sheet | None = None
    free: int | None = None
    """Bytes free on each"""
    precision: PrecisionName = "auto"
    """What auto is on a GPU that is not here"""

    @classmethod
    def of(cls, gpu: str | None, devices: int, key: str = "gpu") -> "PlannedWorld":
        """As many GPUs of that name, or CPUs (cpu), or devices such as this machine's.

        Raises:
            ConfigurationError: a GPU of which no data sheet is known.
        """
        precision: PrecisionName = "auto"
        if gpu is None or gpu.lower() == "cpu":
            device = training_device() if gpu is None else torch.device("cpu")
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
            sheet, free = sheet_of(name), free_memory(device)
        else:
            device, name, sheet = torch.device("cuda"), gpu, sheet_of(gpu)
            if sheet is None:
                hint = f"Known are {', '.join(SHEETS)}, cpu"
                raise ConfigurationError(f"no data sheet of {gpu!r}", where=key, hint=hint)
            free = int(0.99 * sheet.memory * GIB)
            precision = "fp16" if sheet in [SHEETS[old] for old in WITHOUT_BF16] else "bf16"
        launch = Launch(0, devices, 0, min(devices, NODE))
        return cls(device, size=devices, launch=launch, name=name, sheet=sheet, free=free, precision=precision)

    def broadcast(self, value: Any) -> Any:
        """The value: nobody is there to hear it."""
        return value

    def free_memory(self) -> int | None:
        return self.free


@dataclass(frozen=True)
class Speed:
    """The speed of a run on all its devices."""

    tokens_per_second: float
    """Useful tokens of both sides"""
    step_seconds: float
    hours: float
    single: float
    """Tokens/s of one device, and where the figure is from"""
    source: str
    bound: bool
    """The messages between the devices are not counted: no data sheet"""
    guess: bool = False
    """From another kind of device, by the data sheets"""


def assumed_tokenizer(vocab_size: int) -> TokenizerInfo:
    """A tokenizer of that many ids, if the data is not prepared yet."""
    return TokenizerInfo(vocab_size, 0, 1, 2, tuple(range(6, 262)), {"[R]": 3, "[S]": 4, "[X]": 5}, "")


def pack_work(model: Any, encoder: int, decoder: int, longest: int) -> float:
    """Operations of a pack of documents that are as long as may be."""
    documents = max(encoder // longest, 1)
    sides = (torch.full((documents,), size / documents) for size in (encoder, decoder))
    return training_flops(model, *sides)


def predict_speed(
    config: PretrainConfig, model: Any, world: PlannedWorld, assumed: float | None, measured: str | None
) -> Speed | None:
    """Speed and duration of a settled configuration, whose model may be on the meta device, from the tokens/s of one
    device: assumed, of a run that measured them, or known; None without any.

    Raises:
        DataError, ConfigurationError: from the run.
    """
    found = _single(config, model, world, assumed, measured)
    if found is None:
        return None
    single, source, guess = found
    data, devices = config.data, world.size
    tokens = data.packs_per_step * (data.encoder_tokens + data.decoder_tokens) * TYPICAL_FILL
    alone = tokens / single
    step = alone / devices if world.device.type == "cuda" else alone  # processes share the cores of a CPU
    if devices > 1 and world.sheet is not None:
        micro_batches = max(1, data.packs_per_step // (data.packs_per_micro_batch * devices))
        weights = Weights.of(model, config.precision)
        step = step_seconds(alone, weights, world.sheet, devices, shard_size(config, world.launch), micro_batches)
    bound = devices > 1 and world.sheet is None
    return Speed(tokens / step, step, config.steps * step / 3600, single, source, bound, guess)


def _single(
    config: PretrainConfig, model: Any, world: PlannedWorld, assumed: float | None, measured: str | None
) -> tuple[float, str, bool] | None:
    """Tokens/s of one device on this recipe, where the figure is from, and whether it is a guess."""
    if assumed is not None:
        return assumed, "assumed", False
    data = config.data
    shapes = (data.encoder_tokens, data.decoder_tokens, data.max_tokens)
    cost = pack_work(model.config, *shapes) / sum(shapes[:2])
    if measured is not None:
        speed, its = measured_run(Path(measured))
        described = _described(its, model.config)
        if described is None:
            return speed, f"measured by {measured}, taken for the same recipe", False
        its_cost = pack_work(*described) / sum(described[1:3])
        converted = "" if abs(its_cost / cost - 1) < 1e-6 else ", converted by its arithmetic"
        return speed * its_cost / cost, f"measured by {measured}{converted}", False
    if world.sheet is None or config.precision != "bf16":
        return None
    nearest = [pair for pair in KNOWN if SHEETS[pair[0]] is world.sheet] or list(KNOWN)
    known = [(FAT5Config.preset(one, vocab_size=model.config.vocab_size), gpu, one) for gpu, one in nearest]
    size = pack_work(model.config, 1, 1, 1)
    its_model, gpu, preset = min(known, key=lambda one: abs(pack_work(one[0], 1, 1, 1) - size))
    speed, its_shapes = KNOWN[gpu, preset]
    its_cost = pack_work(its_model, *its_shapes) / sum(its_shapes[:2])
    source, its_sheet = f"from {preset} as measured on one {gpu}", SHEETS[gpu]
    guess = world.sheet is not its_sheet
    if guess:
        # A step is bound partly by arithmetic and partly by memory: the worse of both ratios is a careful guess.
        speed *= min(world.sheet.peak / its_sheet.peak, world.sheet.bandwidth / its_sheet.bandwidth)
        source = f"a guess {source}, by the worse ratio of peaks and bandwidths"
    return speed * its_cost / cost, source, guess


def _described(configuration: dict[str, Any], model: FAT5Config) -> tuple[FAT5Config, int, int, int] | None:
    """The model and the shapes that a run's config.yaml tells of; None if it does not."""
    data, chosen = (configuration.get(key) for key in ("data", "model"))
    if not isinstance(data, dict) or not isinstance(chosen, dict):
        return None
    shapes = [data.get(key) for key in ("encoder_tokens", "decoder_tokens", "max_tokens")]
    try:
        its = FAT5Config.preset(
            str(chosen.get("preset")),
            vocab_size=model.vocab_size,
            position_encoding=chosen.get("position_encoding") or "t5",
            **(chosen.get("overrides") or {}),
        )
        encoder, decoder, longest = map(int, shapes)  # type: ignore[arg-type]
    except (FAT5Error, TypeError, ValueError, AttributeError):
        return None
    return its, encoder, decoder, longest


@dataclass(frozen=True)
class Choice:
    """A model that a budget could be spent on."""

    preset: str
    parameters: int
    steps: int
    tokens: float
    """Tokens of text that it sees"""
    ratio: float
    """The same by parameter"""
    fits: bool
    """Into the memory of the device"""
    speed: Speed

    @property
    def suits(self) -> bool:
        """Whether it fits and sees TOKENS_A_PARAMETER or more."""
        return self.fits and self.ratio >= TOKENS_A_PARAMETER

    @property
    def optimal(self) -> int:
        """Parameters of a model that the same operations would show TOKENS_A_PARAMETER: operations go as parameters
        times tokens.
        """
        return round((self.parameters * self.tokens / TOKENS_A_PARAMETER) ** 0.5)


def weigh_budget(
    config: PretrainConfig,
    world: PlannedWorld,
    hours: float,
    vocab_size: int,
    assumed: float | None,
    measured: str | None,
) -> list[Choice]:
    """What each preset would see of web text in so many hours of devices; empty if no speed is known.

    Args:
        config: its model, if given, is the only one that is weighed; sizes that are open are chosen for web text.
        hours: of all devices together.
        assumed, measured: as for `predict_speed`.

    Raises:
        ConfigurationError: tokens/s are assumed, and not of which model.
    """
    presets: tuple[str, ...] = MEASURED_PRESETS if config.model.preset == AUTO else (config.model.preset,)
    if assumed is not None and len(presets) > 1:
        hint = "Say of which model: --model.preset fat5-base"
        raise ConfigurationError("is the speed of one model", where="tokens_per_second", hint=hint)
    if measured is not None and len(presets) > 1:
        presets = ("fat5-demo", *presets)
    info, choices = assumed_tokenizer(vocab_size), []
    data = replace(config.data, sources=[SourceConfig("planned")])
    planned = replace(config, output_dir="planned", resume="never", init_from=None, data=data)
    for preset in presets:
        run = settle(replace(planned, model=replace(config.model, preset=preset)), world, info)
        model = on_meta(configure_model(run, info))
        speed = predict_speed(run, model, world, assumed, measured)
        if speed is None:
            return []
        batch, size = run.data.batch(), model.num_parameters()
        plan = plan_memory(run, batch, model, world)
        steps = int(hours * 3600 / world.size / speed.step_seconds)
        tokens = steps * WEB_PAGES.tokens_a_step(batch)
        fits = world.free is None or plan.total <= world.free
        choices.append(Choice(preset, size, steps, tokens, tokens / size, fits, speed))
    return choices
