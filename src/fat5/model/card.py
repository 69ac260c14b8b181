"""The model card: the README.md of a saved folder, as the Hugging Face hub reads it."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fat5.model import FAT5Config

CARD = "README.md"
PLOT = "loss.png"
LONGEST_EXAMPLE = 500
_AUTHOR = "[FAT5](https://github.com/fat5/fat5)"
_BEGIN, _END = "<!-- fat5:training:begin -->", "<!-- fat5:training:end -->"
# The card of a large model has about 100 kB; a much larger file is no card.
_LARGEST_CARD = 1 << 20


@dataclass
class CardFacts:
    """The content of a card.

    Args:
        name: the card's title.
        kind: the class's name without its family: ForConditionalGeneration, EncoderModel, …
        target: how it is loaded: hf (by stock transformers), fat5, ctranslate2 or onnx.
        license: an identifier that the hub knows; languages: their codes; datasets: names on the hub.
        training: the section from `training_section`.
        pipeline: the hub's name of the task; examples: for its widget, field (text, context) → text.
        conversion: lines of a conversion's report; converted_from: the source's name.
        source_card: whether the source's own card, which FAT5 did not write, is kept beside this one.
        tokenizer: whether the folder holds one.
    """

    name: str
    kind: str
    config: FAT5Config
    parameters: int
    target: str = "hf"
    license: str | None = None
    training: str = ""
    languages: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    conversion: list[str] = field(default_factory=list)
    pipeline: str = ""
    examples: list[dict[str, str]] = field(default_factory=list)
    converted_from: str = ""
    source_card: bool = False
    tokenizer: bool = True


def write_card(folder: Path, facts: CardFacts) -> None:
    """Writes README.md: front matter, how to load without FAT5, what the model is, training, conversion, licence."""
    config = facts.config
    front: dict[str, Any] = {
        "library_name": {"ctranslate2": "ctranslate2", "onnx": "onnx"}.get(facts.target, "transformers"),
        "license": facts.license or "unknown",
        "tags": ["t5", "fat5", "encoder-decoder" if config.is_encoder_decoder else "encoder"],
    }
    if facts.pipeline or (facts.kind == "ForConditionalGeneration" and facts.target != "onnx"):
        front["pipeline_tag"] = facts.pipeline or "text2text-generation"
    if facts.examples:
        front["widget"] = [
            {field: text[:LONGEST_EXAMPLE] for field, text in example.items()} for example in facts.examples
        ]
    if facts.languages:
        front["language"] = facts.languages
    if facts.datasets:
        front["datasets"] = facts.datasets
    layers = counted(config.num_layers, "encoder layer")
    if facts.kind != "EncoderModel":
        layers += f", {counted(config.num_decoder_layers, 'decoder layer')}"
    tied = "tied to" if config.tie_word_embeddings else "apart from"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {facts.name}",
        f"A T5-family model of {facts.parameters:,} parameters, written by {_AUTHOR}.",
        "## How to load it",
        _loading(facts),
        "## The model",
        f"{layers}, width {config.d_model}, {config.num_heads} heads of {config.d_kv}, feed-forward {config.d_ff} "
        f"({config.feed_forward_proj}), {config.position_encoding} positions, {config.vocab_size:,} token ids, output "
        f"{tied} the embeddings.",
        "The tokenizer is in this folder; `AutoTokenizer` loads it."
        if facts.tokenizer
        else "The folder holds no tokenizer.",
    ]
    if facts.training:
        parts.append(f"{_BEGIN}\n{facts.training}\n{_END}")
    if facts.conversion:
        report = "\n".join(line for line in facts.conversion if not line.startswith("file "))
        kept = " Its own card is kept as [SOURCE_README.md](SOURCE_README.md)." if facts.source_card else ""
        parts += ["## Conversion", f"From `{facts.converted_from}` by `fat5 convert`.{kept}", f"```text\n{report}\n```"]
    terms = (
        f"`{facts.license}`. The terms of the text it was trained on may bind its use as well."
        if facts.license
        else "No licence was given for these weights. Before you publish them, check the terms of the text they were "
        "trained on, and state the licence here and in `license:` above."
    )
    parts += ["## Licence", terms]
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def read_card(folder: Path) -> dict[str, Any]:
    """The `CardFacts` in a folder's card: license, languages, datasets, training, source_card; none if there is no card
    or it cannot be read.
    """
    path = folder / CARD
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_CARD:
            return {}
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    front = _front_matter(text)
    license = front.get("license")
    training = re.search(f"{re.escape(_BEGIN)}\n(.*)\n{re.escape(_END)}", text, re.DOTALL)
    return {
        "license": license if isinstance(license, str) and license != "unknown" else None,
        "languages": _names(front.get("language")),
        "datasets": _names(front.get("datasets")),
        "training": training[1] if training else "",
        "source_card": _AUTHOR not in text,
    }


def usage_section(before: str, after: str, modes: bool) -> str:
    """How a pretrained model fills the gap between two texts; `modes`: its tokenizer has the mode tokens."""
    mode = "A mode token says which kind (`[R]` short gaps, `[X]` long or many gaps, `[S]` what follows). " * modes
    prompt = f"{'[R]' * modes}{before}<extra_id_0>{after}"
    return (
        f"## How to ask it\n\nThe model fills gaps. {mode}A sentinel stands for each gap, and the answer repeats each "
        f"sentinel before what it stands for:\n\n```text\n{prompt}\n```\n\n`fat5 generate` puts these tokens in place. "
        "Other tasks need fine-tuning."
    )


def training_section(config: dict[str, Any], summary: dict[str, Any], sources: list[Any], plot: bool) -> str:
    """The section on a pretraining run, from its config.yaml and summary.json, and the `Manifest` of each source.

    `plot`: whether loss.png is beside the card.
    """
    data, optimizer, schedule = config["data"], config["optimizer"], config["schedule"]
    mixture = data["mixture"] if isinstance(data["mixture"], str) else "a list of its own"
    begun = summary.get("init_from")
    done = "Pretrained"
    if begun:
        # A card is for others: not the whole path of the folder.
        name = "/".join(Path(begun["folder"]).parts[-2:])
        done = (
            f"Continued from `{name}` ({begun['kept']:,} token embeddings kept, {begun['averaged']:,} averaged, "
            f"{begun['fresh']:,} fresh), and pretrained"
        )
    lines = [
        "## Training",
        f"{done} by `fat5 pretrain` for {summary['steps']:,} steps with the `{mixture}` mixture of denoisers: "
        f"{summary['train_tokens']:,} encoder and decoder tokens from {summary['raw_tokens']:,} tokens of text, in "
        f"{summary['seconds']:,.0f} seconds on {summary['device']} ({summary['precision']}).",
        "| data | training documents | training tokens | validation tokens | share |\n|---|---|---|---|---|\n"
        + "\n".join(
            f"| {source.name} | {source.documents('train'):,} | {source.tokens('train'):,} | "
            f"{source.tokens('validation'):,} | {chosen['weight']:g} |"
            for source, chosen in zip(sources, data["sources"], strict=True)
        ),
        f"Optimizer {optimizer['name']}, learning rate {optimizer['lr']:g} ({schedule['name']}, "
        f"{schedule['warmup_steps']:,} steps of warm-up), seed {config['seed']}, packs of {data['encoder_tokens']:,} "
        f"encoder and {data['decoder_tokens']:,} decoder tokens, {data['packs_per_step']} a step.",
        f"Validation loss {summary['val_loss_first']:.4f} → **{summary['val_loss_last']:.4f}** nats a token (accuracy "
        f"{summary['val_accuracy_last']:.1%}); the unigram entropy of the same targets is "
        f"{summary['unigram_entropy']:.4f}.",
        "| denoiser | validation loss |\n|---|---|\n"
        + "\n".join(f"| {name} | {loss:.4f} |" for name, loss in summary["val_loss_by_denoiser"].items()),
    ]
    if plot:
        lines.append(f"![Loss, rate and throughput]({PLOT})")
    return "\n\n".join(lines)


def _loading(facts: CardFacts) -> str:
    if facts.target == "ctranslate2":
        return (
            "With `pip install ctranslate2 transformers`, and nothing of FAT5:\n\n```python\nimport ctranslate2\n"
            "from transformers import AutoTokenizer\n\n"
            'translator = ctranslate2.Translator("FOLDER")\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
            'tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("TEXT"))\n'
            "result = translator.translate_batch([tokens], beam_size=1)[0].hypotheses[0]\n"
            "print(tokenizer.decode(tokenizer.convert_tokens_to_ids(result)))\n```"
        )
    if facts.target == "onnx":
        return (
            "With `pip install onnxruntime transformers`, and nothing of FAT5:\n\n```python\n"
            "from onnxruntime import InferenceSession\nfrom transformers import AutoTokenizer\n\n"
            'session = InferenceSession("FOLDER/model.onnx")\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
            'batch = tokenizer(["TEXT"], padding=True, return_tensors="np")\n'
            '(hidden,) = session.run(None, {key: batch[key] for key in ("input_ids", "attention_mask")})\n```\n\n'
            "`hidden` is (batch, length, width), padding included; batch and length are free."
        )
    family = {"mt5": "MT5", "umt5": "UMT5"}.get(facts.config.family, "T5")
    auto = {
        "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
        "EncoderModel": f"{family}EncoderModel" if facts.target == "hf" else "AutoModelForTextEncoding",
        "Model": "AutoModel",
    }.get(facts.kind, f"AutoModel{facts.kind}")
    needs = "With stock `transformers`, and nothing of FAT5:"
    extra = ""
    if facts.target != "hf":
        needs = "Its computation is not stock T5's, so it needs `pip install fat5`:"
        extra = "import fat5  # registers the model with transformers\n"
    return (
        f"{needs}\n\n```python\n{extra}from transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("FOLDER")\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```'
    )


def counted(count: float, noun: str) -> str:
    """A number and its noun, in the plural if need be."""
    shown = f"{count:,.0f}"
    return f"{shown} {noun}" + "s" * (shown != "1")


def _names(value: object) -> list[str]:
    """One name or a list of them."""
    return [value] if isinstance(value, str) else [str(one) for one in value] if isinstance(value, list) else []


def _front_matter(text: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if match is None or len(match[1]) > 1 << 16 or re.search(r"[&*]\w", match[1]):  # no aliases: they expand
        return {}
    try:
        front = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return front if isinstance(front, dict) else {}
