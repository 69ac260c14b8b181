"""The configuration of a pretraining run: what a recipe's YAML holds, and its complete, resolved form."""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import yaml

from fat5.data import BatchConfig, DenoiserConfig, MixtureOfDenoisers
from fat5.errors import ConfigurationError
from fat5.optim import OptimizerConfig, ScheduleConfig
from fat5.train.precision import PrecisionName

AUTO: Any = "auto"
LARGEST_COUNT = 1 << 40
"""Of steps and tokens: beyond any run."""
MOST_WORKERS = 1024
if TYPE_CHECKING:
    Size = int
    """A number; a configuration may say auto instead, until `fat5.train.cost.sizes` has chosen."""
else:
    Size = int | Literal["auto"]


@dataclass
class SourceConfig:
    """A prepared folder and its share of the training tokens."""

    path: str
    """Folder made by `fat5 prepare`"""
    weight: float = 1.0
    """Relative share of the tokens seen in training"""


@dataclass
class DataConfig:
    """What the model reads, and in which shapes."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Prepared folders; the tokenizer and the validation split are those of the first"""
    mixture: str | list[DenoiserConfig] = "fat5"
    """Mixture of denoisers: fat5, ul2, t5, prefix-lm, or a list of {mu, r, max_spans, prefix, proportion}"""
    max_tokens: Size = AUTO
    """Raw tokens of one example; longer documents are cut into consecutive pieces, none is truncated; auto is a quarter
    of encoder_tokens, at most 1,024"""
    encoder_tokens: Size = AUTO
    """Encoder tokens of a pack, a multiple of 128; auto fits the corpus and the memory: 1,024 to 16,384, on a CPU to
    2,048"""
    decoder_tokens: Size = AUTO
    """Decoder tokens of a pack, a multiple of 128; auto is what goes with encoder_tokens on this corpus, as
    `fat5 audit` suggests it"""
    packs_per_step: Size = AUTO
    """Packs of one optimizer step: the global batch; auto fits the corpus: 1 to 8 packs of 16,384 encoder tokens"""
    packs_per_micro_batch: int = 1
    """Packs run at once; less memory with fewer, the same result with any"""
    window: int = 1024
    """Examples the packing looks ahead to"""
    max_examples: int | None = None
    """Most examples of a pack; a sixteenth of encoder_tokens if not given"""
    num_workers: Size = AUTO
    """Processes that prepare batches; 0 prepares them in the training process; auto is 2 with a GPU and 0 without"""

    def batch(self) -> BatchConfig:
        """The shapes, as the loader takes them; refuses shapes that cannot work."""
        return BatchConfig(**{item.name: getattr(self, item.name) for item in fields(BatchConfig)})

    def denoisers(self) -> MixtureOfDenoisers:
        """The mixture; refuses denoisers that cannot work."""
        named = isinstance(self.mixture, str)
        return MixtureOfDenoisers.of(self.mixture if named else [asdict(row) for row in self.mixture])  # type: ignore[arg-type]


@dataclass
class ModelConfig:
    """The model to train."""

    preset: str = "auto"
    """fat5-small (147M parameters), fat5-base (305M), fat5-large (973M) or fat5-demo (25M), at a vocabulary of 32,768;
    auto is fat5-demo on a CPU, on a GPU fat5-small, or fat5-base for a billion tokens of text and more"""
    position_encoding: Literal["t5", "alibi", "rope", "fire", "absolute", "none"] = "t5"
    """How the model knows positions; a t5 model is a plain T5 checkpoint"""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Any key of the model's configuration: {d_model: 256, dropout_rate: 0.1, z_loss: 1e-4}"""


@dataclass
class PretrainConfig:
    """Pretrain an encoder-decoder on token shards with a mixture of denoisers."""

    output_dir: str = ""
    """Folder of the run; a run that it already holds is continued"""
    seed: int = 0
    """Of initialisation, order, noise and dropout"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model to train"""
    data: DataConfig = field(default_factory=DataConfig)
    """What it reads"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How it learns"""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over the run"""
    steps: Size = AUTO
    """Optimizer steps of the whole run; auto makes four passes over the data, in 500 to 100,000 steps"""
    precision: PrecisionName = "auto"
    """fp32, bf16 (autocast, float32 weights), bf16-pure (bf16 weights with Kahan compensation), fp16 (autocast, dynamic
    loss scaling); auto is bf16 on a GPU that has it and fp32 on a CPU"""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the model, full graph; auto does on a GPU"""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Record the launches of a micro-batch once and replay them, so that the GPU never waits for Python; auto does
    where the model is compiled on a GPU, but for fp16"""
    gradient_checkpointing: bool = False
    """Keep the activations of block boundaries only, and compute the rest again in the backward pass"""
    gradient_clip: float | None = 1.0
    """Largest norm of the whole gradient; null leaves it as it is"""
    log_every: int = 10
    """Steps between two lines in a log (metrics.jsonl has every step) and between two points in TensorBoard"""
    eval_every: Size = AUTO
    """Steps between two evaluations; there is one before the first and one after the last step in any case; auto is a
    fifth of the run, at most 500"""
    eval_tokens: Size = AUTO
    """Validation text of an evaluation, in raw tokens; each denoiser is applied to it; auto goes with the length of the
    run: 1,024 to 65,536"""
    save_every: int = 500
    """Steps between two checkpoints; there is one at the end in any case"""
    keep_last: int = 2
    """Newest checkpoints to keep"""
    keep_best: int = 1
    """Checkpoints with the lowest validation loss to keep, among those saved right after an evaluation"""
    keep_every: int | None = None
    """Keep every checkpoint whose step is a multiple of this"""
    on_nan: Literal["abort", "skip", "rewind"] = "abort"
    """When loss or gradient is not finite: abort, skip the step, or rewind (take the last checkpoint, and go on with
    the data that follows)"""
    deterministic: bool = False
    """On a GPU, refuse operations that PyTorch does not guarantee to repeat. A compiled run repeats bit for bit without
    it too (docs/checkpoints.md)"""
    resume: str = "auto"
    """auto (newest checkpoint of output_dir that verifies), never (a folder that holds a run is refused), or the path
    of a checkpoint"""
    strict: bool = False
    """Refuse to start when the newest checkpoint is damaged, instead of taking the one before it"""
    tensorboard: bool = False
    """Write TensorBoard events to DIR/tensorboard"""

    def resolved(self) -> "PretrainConfig":
        """A copy with every default filled in, but for sizes that say auto (`fat5.train.cost.sizes`); refuses
        what cannot work.

        Raises:
            ConfigurationError: a key is missing or has a value that cannot work.
        """
        if not self.output_dir:
            raise ConfigurationError("output_dir is not given", hint="Say where the run goes: --output_dir runs/NAME")
        if not self.data.sources:
            raise ConfigurationError(
                "data.sources is empty", hint="Give a folder made by `fat5 prepare`: sources: [{path: DIR}]"
            )
        _count(1, steps=self.steps, log_every=self.log_every, eval_every=self.eval_every, save_every=self.save_every)
        _count(1, eval_tokens=self.eval_tokens, keep_last=self.keep_last)
        _count(0, keep_best=self.keep_best)
        _count(0, MOST_WORKERS, **{"data.num_workers": self.data.num_workers})
        if self.keep_every is not None:
            _count(1, keep_every=self.keep_every)
        if self.gradient_clip is not None and not 0 < self.gradient_clip < math.inf:
            raise ConfigurationError(
                f"gradient_clip is {self.gradient_clip}", hint="Give a finite norm above 0, or null"
            )
        self.data.denoisers()
        if "auto" not in (getattr(self.data, item.name) for item in fields(BatchConfig)):
            self.data.batch()
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the YAML."""
        plain = asdict(self)
        plain["optimizer"]["betas"] = list(self.optimizer.betas) if self.optimizer.betas else None
        return plain

    def to_yaml(self) -> str:
        """The YAML that makes this configuration again."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def _count(least: int, most: int = LARGEST_COUNT, /, **values: int) -> None:
    for name, value in values.items():
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
            raise ConfigurationError(
                f"{name} is {value!r}", hint=f"Give a whole number of at least {least} and at most {most:,}"
            )
