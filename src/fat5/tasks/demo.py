"""The demo: the whole chain of a recipe, from text to a model that fills in blanks, in one folder."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fat5.data import load_tokenizer, open_shards
from fat5.data.shards.prepare import prepare
from fat5.data.text.corpus import SAMPLE
from fat5.data.tokenizer.training import train_tokenizer
from fat5.files import write_json
from fat5.generate import Decoding, complete
from fat5.launch import refuse_many_processes
from fat5.tasks.config import DemoConfig, SourceConfig
from fat5.tasks.pretraining import pretrain
from fat5.tasks.samples import PROMPTS, held_out_blanks
from fat5.train.run_directory import RunDirectory


def demo(config: DemoConfig, say: Callable[[str], None] = lambda line: None, progress: bool = False) -> dict[str, Any]:
    """Runs the chain in `output_dir` and returns its summary, the content of `summary.json`.

    Args:
        config: its folders are ignored, everything goes under `output_dir`.
        say: gets a line at each stage.

    Raises:
        FAT5Error: from a stage; RunDirectoryError if `output_dir` contains something else.
    """
    refuse_many_processes("the demo")
    began = time.perf_counter()
    folder = Path(config.output_dir)
    run = RunDirectory(folder)
    run.mark()
    tokenizer_folder, shards = folder / "tokenizer", folder / "shards"

    if not (tokenizer_folder / "training.json").exists():
        inputs = _inputs(config.tokenizer.inputs, config.language)
        say(f"tokenizer: learning {config.tokenizer.vocab_size:,} tokens from {', '.join(inputs)}")
        training = replace(config.tokenizer, inputs=inputs, output_dir=str(tokenizer_folder))
        train_tokenizer(training, progress=progress)
    inputs = _inputs(config.prepare.inputs, config.language)
    say(f"shards: {', '.join(inputs)} → {shards}")
    manifest = prepare(
        replace(config.prepare, inputs=inputs, tokenizer=str(tokenizer_folder), output_dir=str(shards)), progress
    )
    assert manifest is not None, "a demo runs its tasks itself"
    say(
        f"shards: {manifest.tokens('train'):,} tokens to train on, {manifest.tokens('validation'):,} held out, "
        "each file with its SHA-256"
    )
    sources = [replace(source, path=str(shards)) for source in config.pretrain.data.sources[:1]]
    data = replace(config.pretrain.data, sources=sources or [SourceConfig(str(shards))])
    languages = config.pretrain.languages or _samples(inputs)
    summary = pretrain(replace(config.pretrain, output_dir=str(folder), data=data, languages=languages))

    say("samples: filling blanks with the trained model")
    from fat5.model import load_model

    tokenizer = load_tokenizer(run.model)
    held_out = held_out_blanks(open_shards(shards, "validation"), tokenizer) if config.prompts is None else []
    prompts = [prompt for prompt, _ in held_out]
    if not held_out:
        prompts = config.prompts if config.prompts is not None else PROMPTS[(_samples(inputs) or ["fr"])[0]]
    answers = complete(
        load_model(run.model),
        tokenizer,
        prompts,
        decoding=Decoding(max_new_tokens=24, sample=True, temperature=0.8, top_k=20, repetition_penalty=1.2),
    )
    summary["samples"] = [asdict(answer) for answer in answers]
    for sample, (_, sentence) in zip(summary["samples"], held_out):
        sample["original"] = sentence
    summary["demo_seconds"] = round(time.perf_counter() - began, 1)
    write_json(run.summary, summary)
    return summary


def _inputs(inputs: list[str], language: str | None) -> list[str]:
    """The recipe's inputs, its samples in the language that was asked for."""
    if language is None:
        return inputs or [f"{SAMPLE}fr"]
    return [f"{SAMPLE}{language}" if name.startswith(SAMPLE) else name for name in inputs or [SAMPLE]]


def _samples(inputs: list[str]) -> list[str]:
    """The languages of the samples among the inputs."""
    return [name.removeprefix(SAMPLE) for name in inputs if name.startswith(SAMPLE)]
