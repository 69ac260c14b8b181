"""`fat5 init`: a commented recipe for a language, a size and a device."""

import re
import shlex
from dataclasses import replace
from typing import Any

from fat5.data import TokenizerInfo
from fat5.errors import ConfigurationError
from fat5.machine import GIB
from fat5.model import PRESETS
from fat5.tasks.config import DataConfig, ModelConfig, PretrainConfig, SourceConfig
from fat5.tasks.forecast import PlannedWorld, assumed_tokenizer, predict_speed
from fat5.tasks.sizes import LARGEST_PACK, LARGEST_PACK_CPU, WEB_PAGES, configure_model, on_meta, settle
from fat5.train.config import AUTO, CheckpointingName
from fat5.train.cost.memory import plan_memory
from fat5.yaml_text import as_yaml, parse_yaml

WEB = "uonlp/CulturaX"
"""Cleaned web text in 167 languages, by their codes (Nguyen et al. 2023)."""

RECIPE = """
tokenizer:
  inputs: {inputs} # {source}
  corpus: {corpus} # the language is a subset of the dataset; its text is in column `text`
  rows: 1000000 # learn from the first million documents, if there are so many
  model: bpe # byte-fallback BPE; or unigram
  vocab_size: {vocab_size} # special tokens included; a multiple of 128
  output_dir: {name}/tokenizer # a folder that stock AutoTokenizer loads
prepare:
  inputs: {inputs} # usually the same, or more of it
  corpus: {corpus} # as above
  tokenizer: {name}/tokenizer # the folder made above
  output_dir: {name}/shards # token shards, manifest and tokenizer
  validation_fraction: {held_out} # chosen by a hash of each document, so adding data moves nothing
  workers: 0 # one process a core; --executor slurm or ray for a cluster
pretrain:
  output_dir: {name}/run # everything of the run; started again, it goes on where it stopped
  seed: 0 # of initialisation, order and noise
  languages: [{language}] # for the model card
  model:
    preset: {preset} # {parameters} parameters; or {others}
    position_encoding: t5 # t5 is a plain T5 checkpoint; or alibi, rope, fire, absolute, none
    overrides:
      dropout_rate: 0.0 # T5 v1.1 pretrains without dropout
      z_loss: 1.0e-4 # keeps the softmax's normaliser near 1 (PaLM, section 5)
  data:
    sources: [{{path: {name}/shards, weight: 1.0}}] # folders of `fat5 prepare`, with their share of the tokens
    mixture: fat5 # UL2's seven denoisers; or ul2, t5, prefix-lm, or a list
    max_tokens: {data.max_tokens} # raw tokens of an example; longer documents are cut, never truncated
    encoder_tokens: {data.encoder_tokens} # encoder budget of a pack; auto fits text and memory
    decoder_tokens: {data.decoder_tokens} # decoder budget of a pack; auto is in the ratio that the text needs
    packs_per_step: {data.packs_per_step} # packs of one optimizer step: the global batch
    max_examples: auto # most examples of a pack; auto fits the corpus: slots that stay empty cost time
    packs_per_micro_batch: 1 # packs run at once; fewer need less memory and give the same result
    num_workers: {data.num_workers} # processes that make batches
  optimizer:
    name: adamw_scale # AdamW whose step is scaled by the RMS of each matrix
    lr: 0.02 # relative to that RMS
    weight_decay: 0.0 # none, as in T5's recipe
  schedule:
    name: cosine # after a warm-up of a fifteenth of the steps, down to final_factor
    final_factor: 0.01 # share of the peak at the last step
  steps: {run.steps} # optimizer steps of the whole run; auto makes four passes over the text
  precision: {precision} # {rounded}
  compile: {compile} # {compiled}
  gradient_checkpointing: {run.gradient_checkpointing} # none, selective or block: the later, the less memory
  gradient_clip: 1.0 # largest norm of the whole gradient
  log_every: 10 # steps between lines of a log; metrics.jsonl has every step
  eval_every: {run.eval_every} # steps between evaluations
  eval_tokens: {run.eval_tokens} # raw validation tokens; each denoiser is applied to all of them
  save_every: {save_every} # steps between checkpoints, written in the background
  keep_last: 2 # newest checkpoints kept
  keep_best: 1 # best checkpoints kept, by validation loss
"""
COMMENTS_FROM = 40
"""Column of the comments, where the line before is not longer."""

PRECISIONS = {
    "bf16": "autocast over float32 weights",
    "fp16": "autocast with a loss scale: this GPU has no bf16",
    "auto": "bf16 on a CPU with matrix units for it (AMX), else fp32",
}


def write_recipe(
    language: str, size: str | None, device: str | None, inputs: list[str], steps: int | None, file: str
) -> str:
    """The text of a recipe whose sections serve `fat5 tokenizer`, `prepare` and `pretrain`.

    Args:
        language: its code of ISO 639, as datasets have it.
        size: demo, small, base or large; None for demo on a CPU, else base.
        device: name of a GPU, cpu, or None for the device of this machine.
        inputs: what `fat5 prepare` takes; sizes are then auto, since they depend on the text. Empty for WEB.
        file: what the recipe will be called.

    Raises:
        ConfigurationError: no code of a language, no data sheet of the device, or a model that it cannot hold.
    """
    if not re.fullmatch("[a-z]{2,3}(-[A-Za-z]+)?", language):
        hint = "Give a code of ISO 639, such as de, es or ar"
        raise ConfigurationError(f"{language!r} is no code of a language", where="language", hint=hint)
    world = PlannedWorld.of(device, 1, key="device")
    small = size == "demo" or (size is None and world.device.type == "cpu")
    config = PretrainConfig(
        output_dir="planned",
        resume="never",
        steps=steps or AUTO,
        precision=world.precision,
        model=ModelConfig(preset=f"fat5-{size}" if size else "auto"),
        data=DataConfig(sources=[SourceConfig("planned")]),
    )
    info = assumed_tokenizer(8_192 if small else 32_768)
    run, model = _fit(config, world, info)
    speed = None if inputs else predict_speed(run, model, world, None, None)
    gpu = world.device.type == "cuda"
    precision = run.precision if gpu else AUTO  # one CPU has what another lacks
    written = RECIPE.format(
        name=f"{language}-{run.model.preset.removeprefix('fat5-')}",
        language=_word(language),
        inputs=f"[{', '.join(map(_word, inputs or [WEB]))}]",
        source="your text" if inputs else "cleaned mC4 and OSCAR; accept its terms on the hub first",
        corpus=f"{{subset: {_word(language)}, split: train}}",
        vocab_size=info.vocab_size,
        held_out=0.01 if inputs else 0.0001,
        preset=run.model.preset,
        others=", ".join(name for name in PRESETS if name != run.model.preset),
        parameters=f"{model.num_parameters() / 1e6:.0f}M",
        run=_open(run, steps) if inputs else run,
        data=_open(run, steps).data if inputs else run.data,
        precision=precision,
        rounded=PRECISIONS[precision],
        compile=str(gpu).lower(),
        compiled="full graph, static shapes, one compilation" if gpu else "takes minutes: for long runs only",
        save_every=500 if inputs else 5_000,
    )
    lines = [line for line in written.strip().splitlines() if not (inputs and line.startswith("  corpus:"))]
    taken = WEB_PAGES.tokens_a_step(run.data.batch())
    where = "a CPU" if not gpu else f"one {world.name}"
    about = [f"{language}, {run.model.preset}, for {where}: written by `fat5 init`. Three commands, in this order:"]
    about += [f"  fat5 {verb:9} --config {shlex.quote(file)}" for verb in ("tokenizer", "prepare", "pretrain")]
    about.append("`fat5 doctor` with this file says what the run takes; `fat5 VERB --help` has every other key.")
    if not inputs:
        about.append(f"About {taken / 1e3:.0f}k tokens of text a step, {taken * run.steps / 1e9:.3g}B in all.")
    if speed is not None:
        about.append(f"About {speed.hours:,.0f} hours at {speed.tokens_per_second:,.0f} tokens/s ({speed.source}).")
    return "\n".join([*(f"# {line}" for line in about), *map(_aligned, lines)]) + "\n"


def _fit(config: PretrainConfig, world: PlannedWorld, info: TokenizerInfo) -> tuple[PretrainConfig, Any]:
    """The settled configuration and its model, with the least recomputation under which the largest pack fits."""
    largest = LARGEST_PACK if world.device.type == "cuda" else LARGEST_PACK_CPU
    policies: tuple[CheckpointingName, ...] = ("none", "selective", "block")
    for policy in policies:
        run = settle(replace(config, gradient_checkpointing=policy), world, info)
        if run.data.encoder_tokens == largest:
            break
    model = on_meta(configure_model(run, info))
    plan = plan_memory(run, run.data.batch(), model, world)
    if world.free is not None and plan.total > world.free:
        what = f"{run.model.preset} needs about {plan.describe()}, and {world.name} has {world.free / GIB:.1f} GiB free"
        raise ConfigurationError(what, where="size", hint="Take a smaller --size, or another --device")
    return run, model


def _open(run: PretrainConfig, steps: int | None) -> PretrainConfig:
    """A copy whose sizes that depend on the text are auto."""
    data = replace(run.data, max_tokens=AUTO, encoder_tokens=AUTO, decoder_tokens=AUTO, packs_per_step=AUTO)
    return replace(run, data=data, steps=steps or AUTO, eval_every=AUTO, eval_tokens=AUTO)


def _word(text: str) -> str:
    """A text as YAML reads it; in quotes where it would be something else, as no (Norwegian) would be false."""
    plain = re.fullmatch(r"[\w./-]+", text) and parse_yaml(text, text) == text
    return text if plain else as_yaml(text)


def _aligned(line: str) -> str:
    key, sign, comment = line.partition(" # ")
    return f"{key:{COMMENTS_FROM - 1}}{sign.lstrip()}{comment}" if len(key) < COMMENTS_FROM - 1 and sign else line
