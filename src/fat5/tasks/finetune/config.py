"""The keys of `fat5 finetune`; imports no torch, so that `fat5 finetune --help` answers at once."""

from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Literal

from fat5.errors import LARGEST_SIZE, ConfigurationError, check_whole
from fat5.tasks.metrics import KINDS
from fat5.train.config import AUTO, LARGEST_COUNT, RunConfig, Size, check_count

TaskName = Literal[
    "text-to-text",
    "instructions",
    "sequence-classification",
    "regression",
    "token-classification",
    "question-answering",
]
METRICS = {
    "text-to-text": KINDS["text"],
    "instructions": ("rouge1", "rouge2", "rougeL", "exact_match"),
    "sequence-classification": KINDS["classification"],
    "regression": KINDS["regression"],
    "token-classification": KINDS["entities"],
    "question-answering": KINDS["answers"],
}
"""Task → its metrics; each task has loss and accuracy as well."""

RATES = {"adamw_scale": 2e-3, "adamw": 1e-4}
"""Learning rates of fine-tuning where it has others than pretraining."""

MOST_SEEDS, LARGEST_RANK = 100, 4096
FEWEST_TOKENS = 8
"""Least room for an input: two texts with EOS after each need more than 2."""


@dataclass
class Columns:
    """The names of the columns in your files; `translation.fr` is the key `fr` inside the column `translation`."""

    source: str = "source"
    """text-to-text: the input"""
    target: str = "target"
    """text-to-text: what the model should write"""
    text: str = "text"
    """sequence-classification and regression: the text"""
    text_pair: str | None = None
    """sequence-classification and regression: a second text, for pairs of sentences"""
    label: str = "label"
    """sequence-classification: a name or a whole number; regression: a number"""
    tokens: str = "tokens"
    """token-classification: the list of words"""
    tags: str = "tags"
    """token-classification: the list of tags, one a word; B-, I- and O mark entities"""
    question: str = "question"
    """question-answering: the question"""
    context: str = "context"
    """question-answering: the text that holds the answer"""
    answers: str = "answers"
    """question-answering: {text: [...], answer_start: [...]}, as in SQuAD; both empty where there is no answer"""
    definition: str = "definition"
    """instructions: what to do"""
    examples: str | None = "examples"
    """instructions: worked examples, a list of {input, output}, shown before the input; a file may lack the column"""
    input: str = "input"
    """instructions: the input"""
    output: str = "output"
    """instructions: what the model should write, or a list of such texts, of which the first is learned"""


@dataclass
class TaskData:
    """The examples of a task."""

    train: list[str] = field(default_factory=list)
    """Files (.jsonl, .json, .csv, .tsv, .parquet, also compressed), folders of them, hf:NAME for one of the hub, or
    sample:fr-en, the paragraphs of the sample corpus in both languages (columns id, chapter, fr, en)"""
    validation: list[str] = field(default_factory=list)
    """The same for the examples scored during training; if not given, validation_fraction of train is held out"""
    test: list[str] = field(default_factory=list)
    """The same for the final results; if not given, they are those of the validation examples"""
    subset: str | None = None
    """Configuration of a dataset on the hub"""
    columns: Columns = field(default_factory=Columns)
    """The names of the columns"""
    prefix: str = ""
    """Text put before each input: "translate English to French: " """
    validation_fraction: float = 0.1
    """Share of train held out if validation is not given, chosen by a hash of the input: equal inputs stay together"""
    max_examples: int | None = None
    """Take at most this many examples of each split, the first ones"""
    max_source_tokens: int = 1024
    """Longest input; longer than in pretraining works with relative positions"""
    max_target_tokens: int = 256
    """Longest target"""
    too_long: Literal["truncate", "refuse"] = "truncate"
    """What to do with a longer input or target: cut its end off and count it, or refuse the file"""
    stride: int = 128
    """question-answering: tokens that two windows of a long context share"""
    batch_size: int = 32
    """Examples of an optimizer step, on average: a step packs as many tokens as this many examples have"""
    encoder_tokens: Size = AUTO
    """Encoder tokens of a pack, a multiple of 128; auto is a step's tokens, at most 16,384, on a CPU 4,096"""
    num_workers: Size = AUTO
    """Processes that prepare batches; auto is 2 with a GPU and 0 without"""


@dataclass
class LoraConfig:
    """Train small matrices beside the weights in place of the weights themselves (Hu et al. 2021), through PEFT."""

    rank: int = 0
    """Width of the matrices, such as 16; 0 trains all weights instead. The optimizer is then adamw at 1e-3, unless
    optimizer.lr is given"""
    alpha: float | None = None
    """The matrices' product is scaled by alpha / rank; twice the rank if not given"""
    dropout: float = 0.0
    """Dropout of the matrices' input"""
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"])
    """Names of the layers that get them"""


@dataclass
class FinetuneConfig(RunConfig):
    """Fine-tune a T5-family model on a task: translation, summarisation, classification, tagging, answers."""

    task: TaskName = "text-to-text"
    """The form of the examples and of the model"""
    model: str = ""
    """Folder of a run, of a model or of a checkpoint, T5 family, FAT5's or not; or none: random weights"""
    tokenizer: str | None = None
    """Folder of the tokenizer if the model's has none; with model none also of the configuration, if it holds one"""
    preset: str = "fat5-demo"
    """With model none and a tokenizer alone: the model's size, as in `fat5 pretrain`"""
    data: TaskData = field(default_factory=TaskData)
    """The examples"""
    epochs: float = 3.0
    """Passes over the training examples, from which auto steps follow"""
    steps: Size = AUTO
    """Optimizer steps of the whole run; auto makes as many as epochs takes"""
    eval_every: Size = AUTO
    """Steps between two evaluations; there is one before the first and one after the last step in any case; auto is
    about a pass over the training examples"""
    keep_best: int = 1
    """Checkpoints with the best metric to keep, among those saved right after an evaluation"""
    save_every: Size = AUTO  # type: ignore[assignment]
    """Steps between two checkpoints; auto saves after each evaluation"""
    metric: str = "loss"
    """What decides which checkpoint is best, and when to stop: loss, or a metric of the task (bleu, macro_f1, …)"""
    use_best: bool = True
    """Export, and predict with, the weights of the best evaluation that was saved"""
    seeds: int = 1
    """Repeat with this many seeds, each in a folder seed-N; results.json then has mean and interval"""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adaptation"""
    head: Literal["encoder", "encoder-decoder"] = "encoder"
    """Classification and answers: read from the encoder alone, or from the decoder too as the stock T5 classes"""
    class_weights: dict[str, float] | Literal["balanced"] | None = None
    """Weights of the classes in the loss, by label; balanced is inverse to their frequency"""
    label_smoothing: float = 0.0
    """Share of each target spread over all others, in the training loss"""
    dropout: float | None = None
    """Dropout rate; the model's own if not given"""
    languages: list[str] = field(default_factory=list)
    """Codes of the languages, for the model card and for the articles that answers are compared without: [fr]"""
    num_beams: int = 1
    """Beams of the predictions"""
    max_new_tokens: int | None = None
    """Longest prediction; data.max_target_tokens if not given"""
    eval_examples: int = 256
    """text-to-text and instructions: validation examples written out at each evaluation, if metric needs them"""
    predict_batch: int = 32
    """Examples predicted at once"""

    def resolved(self) -> "FinetuneConfig":
        """A copy with every default filled in, but for sizes that say auto; refuses what cannot work.

        Raises:
            ConfigurationError: a key is missing or has a value that cannot work.
        """
        optimizer = self.optimizer
        if optimizer.lr is None and self.lora.rank > 0 and optimizer.name in RATES:
            # Low-rank matrices begin at 0, where a rate relative to the RMS is none.
            optimizer = replace(optimizer, name="adamw", lr=1e-3)
        elif optimizer.lr is None:
            optimizer = replace(optimizer, lr=RATES.get(optimizer.name))
        config = super(FinetuneConfig, replace(self, optimizer=optimizer)).resolved()
        if not self.model:
            raise ConfigurationError("model is not given", hint="Give a folder: --model DIR, or none")
        if not self.data.train:
            raise ConfigurationError("data.train is not given", hint="Give the training examples: --data.train FILE")
        if self.model == "none" and self.tokenizer is None:
            raise ConfigurationError("model is none, and tokenizer is not given", hint="Give --tokenizer DIR")
        metrics = ("loss", *METRICS[self.task])
        if self.metric not in metrics:
            near = get_close_matches(self.metric, metrics, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"{self.task} has {', '.join(metrics)}"
            raise ConfigurationError(f"metric is {self.metric!r}", hint=hint)
        data = self.data
        self.check_reading("data.")
        check_count("data.batch_size", data.batch_size, most=LARGEST_SIZE)
        check_whole(self.eval_examples, "eval_examples")
        check_whole(self.seeds, "seeds", most=MOST_SEEDS)
        check_whole(self.lora.rank, "lora.rank", least=0, most=LARGEST_RANK)
        for name, value, most in (
            ("data.validation_fraction", data.validation_fraction, 1.0),
            ("label_smoothing", self.label_smoothing, 1.0),
            ("dropout", self.dropout or 0.0, 1.0),
            ("lora.dropout", self.lora.dropout, 1.0),
        ):
            if not 0 <= value < most:
                raise ConfigurationError(f"{name} is {value}", hint=f"Give a number from 0 up to, not with, {most:g}")
        if not 0 < self.epochs <= 1e6:
            raise ConfigurationError(f"epochs is {self.epochs}", hint="Give a number above 0")
        classifies = self.task in ("sequence-classification", "token-classification")
        if self.class_weights is not None and not classifies:
            raise ConfigurationError(f"class_weights is set, and {self.task} has no classes", hint="Remove it")
        if self.label_smoothing and self.task in ("regression", "question-answering"):
            what = f"label_smoothing is {self.label_smoothing:g}, and {self.task} has no classes"
            raise ConfigurationError(what, hint="Remove it")
        if data.prefix and self.task in ("token-classification", "question-answering"):
            raise ConfigurationError(f"data.prefix is set, and {self.task} has no place for it", hint="Remove it")
        if self.head == "encoder-decoder" and self.task not in (
            "sequence-classification", "regression", "question-answering",
        ):  # fmt: skip
            raise ConfigurationError(f"head is encoder-decoder, and {self.task} has no such head", hint="Remove it")
        return config

    def check_reading(self, section: str) -> None:
        """Refuses lengths and counts by which no example can be read or predicted.

        Args:
            section: put before the names of the keys of `data` in messages.

        Raises:
            ConfigurationError: one of them is out of its bounds.
        """
        data = self.data
        for key, least in (("max_source_tokens", FEWEST_TOKENS), ("max_target_tokens", 2), ("encoder_tokens", 1)):
            check_count(f"{section}{key}", getattr(data, key), least, LARGEST_SIZE)
        for key in ("predict_batch", "num_beams"):
            check_whole(getattr(self, key), key)
        check_whole(data.stride, f"{section}stride", least=0)
        for key, count in ((f"{section}max_examples", data.max_examples), ("max_new_tokens", self.max_new_tokens)):
            if count is not None:
                check_whole(count, key, most=LARGEST_COUNT)
        if self.task == "question-answering" and data.stride >= data.max_source_tokens:
            raise ConfigurationError(
                f"{section}stride is {data.stride}, and an input has {data.max_source_tokens:,} tokens",
                hint=f"Give a stride below {section}max_source_tokens",
            )
