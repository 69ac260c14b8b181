"""The keys of `fat5 demo`; imports no torch, so that its --help answers at once."""

from dataclasses import dataclass, field
from typing import Literal

from fat5.data.config import PrepareConfig, TokenizerTraining
from fat5.tasks.config import PretrainConfig


@dataclass
class DemoConfig:
    """Run the whole chain on the sample corpus: tokenizer, shards, pretraining, plot, samples.

    Args:
        output_dir: folder for everything the demo makes; run again, it goes on where it stopped.
        language: takes the sample corpus in this language in place of the recipe's; fr where neither names one.
        tokenizer: the tokenizer's keys, as for `fat5 tokenizer`.
        prepare: the shards' keys, as for `fat5 prepare`.
        pretrain: the training's keys, as for `fat5 pretrain`.
        prompts: texts to complete at the end; by default five of the language.
    """

    output_dir: str = "demo"
    language: Literal["fr", "en", "de"] | None = None
    tokenizer: TokenizerTraining = field(default_factory=lambda: TokenizerTraining(inputs=[], output_dir=""))
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    prompts: list[str] | None = None
