"""The keys of `fat5 pretrain`, `fat5 evaluate` and `fat5 demo`; imports no torch, so that --help answers at once."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from fat5.data.config import PrepareConfig, TokenizerTraining
from fat5.data.examples.config import BatchConfig, DenoiserConfig
from fat5.errors import ConfigurationError
from fat5.tasks.finetune.config import TaskName
from fat5.train.config import AUTO, PrecisionName, RunConfig, Size, check_count

if TYPE_CHECKING:
    from fat5.data import MixtureOfDenoisers

MOST_WORKERS = 1024
INIT_FROM = "init_from"
"""The preset of a model that a checkpoint describes."""


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
    """Denoisers: fat5, fat5-anywhere, ul2, t5, prefix-lm, or a list of {mu, r, max_spans, prefix, anywhere,
    proportion}"""
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
    max_examples: Size = AUTO
    """Most examples of a pack; auto is what a pack of this corpus rarely exceeds, and every slot that stays empty costs
    attention time"""
    num_workers: Size = AUTO
    """Processes that prepare batches; 0 prepares them in the training process; auto is 2 with a GPU and 0 without"""

    def batch(self) -> BatchConfig:
        """The shapes, as the loader takes them; refuses shapes that cannot work. While max_examples is not chosen, the
        most that it can be."""
        shapes = {item.name: getattr(self, item.name) for item in fields(BatchConfig)}
        return BatchConfig(**shapes | {"max_examples": None if self.max_examples == AUTO else self.max_examples})

    def denoisers(self) -> "MixtureOfDenoisers":
        """The mixture; refuses denoisers that cannot work."""
        from fat5.data import MixtureOfDenoisers

        named = isinstance(self.mixture, str)
        return MixtureOfDenoisers.of(self.mixture if named else [asdict(row) for row in self.mixture])  # type: ignore[arg-type]


@dataclass
class ModelConfig:
    """The model to train."""

    preset: str = "auto"
    """fat5-small (147M parameters), fat5-base (305M), fat5-large (973M) or fat5-demo (25M), at a vocabulary of 32,768;
    auto is fat5-demo on a CPU, on a GPU fat5-small, or fat5-base for a billion tokens of text and more; init_from is
    the model of the folder of that key"""
    position_encoding: Literal["auto", "t5", "alibi", "rope", "fire", "absolute", "none"] = "auto"
    """How the model knows positions; a t5 model is a plain T5 checkpoint; auto is t5, or what init_from has"""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Any key of the model's configuration: {d_model: 256, dropout_rate: 0.1, z_loss: 1e-4}; with init_from only those
    that leave the weights as they are"""


@dataclass
class PretrainConfig(RunConfig):
    """Pretrain an encoder-decoder on token shards with a mixture of denoisers."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model to train"""
    init_from: str | None = None
    """Begin from the weights in this folder: a run, model or checkpoint of FAT5, or a T5, v1.1, FLAN-T5, mT5, umT5 or
    ByT5 of transformers. The tokenizer is that of the data; tokens that both have keep their embeddings"""
    init_tokenizer: str | None = None
    """Folder of the tokenizer that init_from was trained with, if it is not beside it"""
    data: DataConfig = field(default_factory=DataConfig)
    """What it reads"""
    languages: list[str] = field(default_factory=list)
    """Codes of the text's languages, for the model card: [fr]"""
    eval_tokens: Size = AUTO
    """Validation text of an evaluation, in raw tokens; each denoiser is applied to it; auto goes with the length of the
    run: 1,024 to 65,536"""

    def resolved(self) -> "PretrainConfig":
        """A copy with every default filled in, but for sizes that say auto (`fat5.tasks.sizes`); refuses what cannot
        work.

        Raises:
            ConfigurationError: a key is missing or has a value that cannot work.
        """
        config = super().resolved()
        if not self.data.sources:
            raise ConfigurationError(
                "data.sources is empty", hint="Give a folder made by `fat5 prepare`: sources: [{path: DIR}]"
            )
        check_count("eval_tokens", self.eval_tokens)
        check_count("data.num_workers", self.data.num_workers, least=0, most=MOST_WORKERS)
        self.data.denoisers()
        shapes = {item.name: getattr(self.data, item.name) for item in fields(BatchConfig)}
        if AUTO not in (shapes | {"max_examples": None}).values():
            self.data.batch()
        return config


@dataclass
class EvaluateConfig:
    """Scores of a model: of a task on examples, with intervals; or loss and accuracy by denoiser on prepared text."""

    model: str = ""
    """Folder of a run, of a model (config.json and model.safetensors), of a checkpoint or of an adapter. A run, its
    model/, adapter/ and checkpoints are scored as the run was, unless a key below says otherwise"""
    data: list[str] = field(default_factory=list)
    """Task: files of examples, folders of them, hf:NAME or sample:LANGUAGE; for a run its test or validation examples.
    Denoisers: folders made by `fat5 prepare`; for a run those it was trained on, with their weights"""
    split: str | None = None
    """train, validation or test: of the run, of a dataset on the hub, or of a prepared folder. For a run its test split
    if it has one, for a dataset test, else validation"""
    task: TaskName | None = None
    """The form of the examples and of the model; for a run its own. Without it, and on prepared folders, denoisers"""
    columns: dict[str, str | None] = field(default_factory=dict)
    """Task: names of the columns, as data.columns of `fat5 finetune`: {text: body, label: topic}; for a run its own"""
    prefix: str | None = None
    """Task: text put before each input; for a run its own"""
    tokenizer: str | None = None
    """Task: folder of the tokenizer if the model's has none"""
    subset: str | None = None
    """Task: configuration of a dataset on the hub"""
    languages: list[str] = field(default_factory=list)
    """Task: codes of the languages; answers are compared without the articles of the first; for a run its own"""
    max_examples: int | None = None
    """Task: take at most this many examples, the first ones"""
    max_source_tokens: int | None = None
    """Task: longest input; for a run its own, else 1024"""
    max_target_tokens: int | None = None
    """Task: longest target; for a run its own, else 256"""
    too_long: Literal["truncate", "refuse"] | None = None
    """Task: cut the end of a longer one off and count it, or refuse the file; for a run its own, else truncate"""
    stride: int | None = None
    """question-answering: tokens that two windows of a long context share; for a run its own, else 128"""
    num_beams: int | None = None
    """Task: beams of the predictions; for a run its own, else 1"""
    max_new_tokens: int | None = None
    """Task: longest prediction; for a run its own, else max_target_tokens"""
    predict_batch: int | None = None
    """Task: texts predicted at once; for a run its own, else 32"""
    predictions: str | None = None
    """Task: write a line for each example to this file: input, target, prediction, score. Texts are kept in
    FILE.partial as they come, and the same command goes on there"""
    weights: list[float] = field(default_factory=list)
    """Denoisers: relative share of the tokens of each folder in data; all equal if empty"""
    mixture: str | None = None
    """Denoisers: fat5, fat5-anywhere, ul2, t5 or prefix-lm; for a run its own, else fat5"""
    eval_tokens: int | None = None
    """Denoisers: text in raw tokens, each denoiser is applied to it; for a run its own, else 65536"""
    max_tokens: int | None = None
    """Denoisers: raw tokens of one example; for a run its own, else 1024"""
    decoder_tokens: int | None = None
    """Denoisers: decoder tokens of a batch; for a run its own, else 8192"""
    encoder_tokens: int | None = None
    """Encoder tokens of a batch; for a run its own, else 16384, for a task on a CPU 4096"""
    precision: PrecisionName | None = None
    """fp32, bf16 or fp16 (autocast), bf16-pure, or auto (bf16 on a GPU that has it and on a CPU with AMX, else fp32
    on a CPU); for a run its own, else auto"""
    output: str | None = None
    """Write the scores to this JSON file as well"""

    def given(self, keys: Sequence[str]) -> dict[str, Any]:
        """Those of some keys that have a value."""
        values = {key: getattr(self, key) for key in keys}
        return {key: value for key, value in values.items() if value not in (None, [], {})}


@dataclass
class DemoConfig:
    """Run the whole chain on the sample corpus: tokenizer, shards, pretraining, plot, samples.

    Args:
        output_dir: folder for everything the demo makes; run again, it goes on where it stopped.
        language: takes the sample corpus in this language in place of the recipe's; fr where neither names one.
        tokenizer: the tokenizer's keys, as for `fat5 tokenizer`.
        prepare: the shards' keys, as for `fat5 prepare`.
        pretrain: the training's keys, as for `fat5 pretrain`.
        prompts: texts to complete at the end; by default twenty held-out sentences, unselected, or five of the language
            where no document is held out.
    """

    output_dir: str = "demo"
    language: Literal["fr", "en", "de"] | None = None
    tokenizer: TokenizerTraining = field(default_factory=lambda: TokenizerTraining(inputs=[], output_dir=""))
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    prompts: list[str] | None = None
