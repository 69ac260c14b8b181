"""What every run has, whatever its task: a folder, a length, an optimizer, and what is logged, saved and kept."""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import yaml

from fat5.errors import ConfigurationError, check_whole
from fat5.launch import Launch
from fat5.optim import OptimizerConfig, ScheduleConfig

PrecisionName = Literal["auto", "fp32", "bf16", "bf16-pure", "fp16"]
CheckpointingName = Literal["none", "selective", "block"]
ParallelName = Literal["ddp", "fsdp", "hsdp"]
TrackerName = Literal["tensorboard", "wandb", "trackio"]
AUTO: Any = "auto"
LARGEST_COUNT = 1 << 40
"""Of steps and tokens: beyond any run."""
if TYPE_CHECKING:
    Size = int
    """A number; a configuration may say auto instead, until the task has chosen."""
else:
    Size = int | Literal["auto"]


@dataclass
class RunConfig:
    """The keys of a run that do not depend on its task."""

    output_dir: str = ""
    """Folder of the run; a run that is already there is continued"""
    seed: int = 0
    """Of initialisation, order, noise and dropout"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How it learns"""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over the run"""
    steps: Size = AUTO
    """Optimizer steps of the whole run; auto makes four passes over the data, in 500 to 100,000 steps"""
    precision: PrecisionName = "auto"
    """fp32, bf16 (autocast, float32 weights), bf16-pure (bf16 weights with Kahan compensation), fp16 (autocast, dynamic
    loss scaling); auto is bf16 on a GPU that has it and on a CPU with AMX, fp32 on another CPU"""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the model, full graph; auto does on a GPU"""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Record the launches of a micro-batch once and replay them, so that the GPU never waits for Python; auto does
    where the model is compiled on a GPU, but for fp16. True also replays the decoding steps of fine-tuning's
    predictions, which has not been proved on a card"""
    parallel: ParallelName = "ddp"
    """How several processes train (torchrun): ddp (each has the whole model), fsdp (FSDP2: weights, gradients and
    optimizer state are divided among them), hsdp (divided inside a node, copied across nodes). One process trains alone
    under each"""
    hsdp_shard_size: int | None = None
    """hsdp: processes that the weights are divided among; those of a node if not given"""
    gradient_checkpointing: bool | CheckpointingName = "none"
    """Activations kept for the backward pass: none computes nothing again; selective keeps attention and its products,
    and computes norms and the feed-forward again; block (or true) keeps the boundaries of blocks only"""
    gradient_clip: float | None = 1.0
    """Largest norm of the whole gradient; null leaves it as it is"""
    log_every: int = 10
    """Steps between two lines in a log (metrics.jsonl has every step) and between two points in a tracker"""
    eval_every: Size = AUTO
    """Steps between two evaluations; there is one before the first and one after the last step in any case; auto is a
    fifth of the run, at most 500"""
    save_every: int = 500
    """Steps between two checkpoints; there is one at the end in any case"""
    keep_last: int = 2
    """Newest checkpoints to keep"""
    keep_best: int = 1
    """Checkpoints with the lowest validation loss to keep, among those saved right after an evaluation"""
    keep_every: int | None = None
    """Keep every checkpoint whose step is a multiple of this"""
    patience: int | None = None
    """Stop after this many evaluations in a row without a better one; null trains to the last step"""
    use_best: bool = False
    """Export the weights of the best evaluation that was saved, in place of the last ones"""
    on_nan: Literal["abort", "skip", "rewind"] = "abort"
    """When loss or gradient is not finite: abort, skip the step, or rewind (take the last checkpoint, and go on with
    the data that follows)"""
    on_spike: Literal["warn", "rewind"] = "warn"
    """When the loss of a step lies far above those before it: warn, or rewind; either puts the examples on record in
    events.jsonl"""
    spike_sigma: float = 6.0
    """How far: in standard deviations of the last 50 losses or so"""
    deterministic: bool = False
    """On a GPU, refuse operations that PyTorch does not guarantee to repeat. A compiled run repeats bit for bit without
    it too (docs/checkpoints.md)"""
    resume: str = "auto"
    """auto (newest checkpoint of output_dir that verifies), never (a folder with a run is refused), or the path
    of a checkpoint"""
    strict: bool = False
    """Refuse to start when the newest checkpoint is damaged, instead of taking the one before it"""
    tensorboard: bool = False
    """Write TensorBoard events to DIR/tensorboard: the same as report_to [tensorboard]"""
    report_to: list[TrackerName] = field(default_factory=list)
    """Trackers that get the rows of metrics.jsonl too: tensorboard, wandb, trackio"""

    def resolved(self) -> Self:
        """A copy with every default filled in, but for sizes that say auto; refuses what cannot work.

        Raises:
            ConfigurationError: a key is missing or has a value that cannot work.
        """
        if not self.output_dir:
            raise ConfigurationError("output_dir is not given", hint="Say where the run goes: --output_dir runs/NAME")
        for key in ("steps", "log_every", "eval_every", "save_every", "keep_last"):
            check_count(key, getattr(self, key))
        check_count("keep_best", self.keep_best, least=0)
        for key in ("keep_every", "patience"):
            if getattr(self, key) is not None:
                check_count(key, getattr(self, key))
        if self.hsdp_shard_size is not None:
            check_count("hsdp_shard_size", self.hsdp_shard_size, least=2)
            if self.parallel != "hsdp":
                hint = "Say parallel hsdp, or leave it out"
                raise ConfigurationError(f"hsdp_shard_size is set, and parallel is {self.parallel}", hint=hint)
        for name in self.report_to:
            if name not in get_args(TrackerName):
                raise ConfigurationError(
                    f"report_to names {name!r}", hint=f"Choose among {', '.join(get_args(TrackerName))}"
                )
        if self.use_best and not self.keep_best:
            raise ConfigurationError("use_best is true, and keep_best is 0", hint="Keep at least one: keep_best 1")
        if not 0 < self.spike_sigma < math.inf:
            raise ConfigurationError(f"spike_sigma is {self.spike_sigma}", hint="Give a finite number above 0")
        if self.gradient_clip is not None and not 0 < self.gradient_clip < math.inf:
            raise ConfigurationError(
                f"gradient_clip is {self.gradient_clip}", hint="Give a finite norm above 0, or null"
            )
        schedule = self.schedule
        if self.steps != "auto":
            schedule.validate(self.steps)
            schedule = schedule.resolved(self.steps)
        if self.precision == "bf16-pure" and self.optimizer.name != "adamw_scale":
            raise ConfigurationError(
                f"precision is bf16-pure, and {self.optimizer.name} does not compensate the rounding of bf16 weights",
                hint="Use adamw_scale, or precision bf16",
            )
        return replace(self, optimizer=self.optimizer.resolved(), schedule=schedule)

    @property
    def checkpointing(self) -> CheckpointingName:
        """The policy of gradient_checkpointing; true and false are its former values."""
        given = self.gradient_checkpointing
        return given if isinstance(given, str) else "block" if given else "none"

    def trackers(self) -> list[TrackerName]:
        """The trackers asked for, each once."""
        return list(dict.fromkeys([*(["tensorboard"] if self.tensorboard else []), *self.report_to]))  # type: ignore[list-item]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the YAML."""
        plain = asdict(self)
        plain["optimizer"]["betas"] = list(self.optimizer.betas) if self.optimizer.betas else None
        return plain

    def to_yaml(self) -> str:
        """The YAML that makes this configuration again."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


DIVISIBLE = ("adamw_scale", "adamw")
"""Optimizers that compute by element, or know how to compute a number of a whole matrix from its parts."""


def shard_size(config: RunConfig, launch: Launch | None = None) -> int:
    """How many processes hold the weights together; 1 where each has all of them.

    Args:
        launch: this process among the others; that of the environment if None.

    Raises:
        ConfigurationError: the processes cannot be divided so, or the run has what sharded weights do not work with.
    """
    launch = launch or Launch.here()
    if launch.size == 1 or config.parallel == "ddp":
        return 1
    if config.optimizer.name not in DIVISIBLE:
        raise ConfigurationError(
            f"{config.optimizer.name} needs whole matrices, which parallel {config.parallel} divides",
            hint=f"Use {' or '.join(DIVISIBLE)}, or parallel ddp",
        )
    if config.precision == "fp16":
        raise ConfigurationError(
            f"precision fp16 scales its loss by the whole gradient, which parallel {config.parallel} divides",
            hint="Use precision bf16 or fp32, or parallel ddp",
        )
    if config.parallel == "fsdp":
        return launch.size
    size = config.hsdp_shard_size or launch.local_size
    if size == launch.size or launch.size % size:
        raise ConfigurationError(
            f"parallel hsdp divides the weights among {size} of {launch.size} processes",
            hint="Set hsdp_shard_size to a smaller number that divides that of the processes, or use parallel fsdp",
        )
    return size


def check_count(key: str, value: object, least: int = 1, most: int = LARGEST_COUNT) -> None:
    """Raises ConfigurationError for a value that is neither auto nor a whole number from `least` to `most`."""
    if value != "auto":
        check_whole(value, key, least, most)
