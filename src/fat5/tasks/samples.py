"""What a trained model writes: validation examples, held-out sentences, and the prompts of a language, completed."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from fat5.data import PackedBatch, Tokenizer, TokenShards, unpack
from fat5.train.evaluation import Scorer

LEAST_PROMPT = 16
"""Encoder tokens from which an example says something; the shortest of these is shown, since it is read by a person."""
LONGEST_ANSWER = 32

PROMPTS = {
    "fr": [
        "Le paquet est installé par la commande ___ dans le terminal.",
        "Le noyau ___ est un logiciel libre.",
        "Il est possible de configurer le serveur en modifiant le fichier ___.",
        "L'administrateur doit ___ les mises à jour de sécurité.",
        "Pour installer un logiciel, il faut",
    ],
    "en": [
        "The package is installed by the command ___ in the terminal.",
        "The ___ kernel is free software.",
        "The server can be configured by editing the file ___.",
        "The administrator should ___ the security updates.",
        "In order to install software, it is necessary",
    ],
    "de": [
        "Das Paket wird mit dem Befehl ___ im Terminal installiert.",
        "Der ___-Kernel ist freie Software.",
        "Der Server wird durch Bearbeiten der Datei ___ konfiguriert.",
        "Der Administrator sollte die ___ installieren.",
        "Um Software zu installieren, muss man",
    ],
}
"""Texts of each language for a pretrained model to complete; the first has one blank."""

DOCUMENTS = 10_000  # read for sentences; a demo may be given a large corpus
SENTENCES = 20
SENTENCE_WORDS = range(8, 21)
SENTENCE = re.compile(r"[^\W\d_](?:[^\W\d_]|[’',\- ])+\.")
"""Letters, apostrophes, commas, hyphens and single spaces up to a full stop: no file names, numbers or quotes."""
BLANK_WORDS = 2


def held_out_blanks(shards: TokenShards, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(prompt, sentence) of `SENTENCES` held-out documents, chosen by a rule: nobody picks them.

    The first sentence of each document with 8 to 20 words and of the form `SENTENCE`, each sentence once; of these the
    first in order of their SHA-256. The blank stands for the two words in the middle.
    """
    found = set[str]()
    for document in islice(shards, DOCUMENTS):
        parts = re.split(r"\n|(?<=[.!?:;]) ", tokenizer.decode(document.tolist()))
        fit = (part for part in parts if SENTENCE.fullmatch(part) and len(part.split(" ")) in SENTENCE_WORDS)
        found.update(part for part in [next(fit, "")] if part[:1].isupper())
    chosen = sorted(found, key=lambda sentence: hashlib.sha256(sentence.encode()).digest())[:SENTENCES]
    return [(_with_blank(sentence), sentence) for sentence in chosen]


def _with_blank(sentence: str) -> str:
    """The sentence with its middle words as a blank; a comma behind them stays."""
    words = sentence.split(" ")
    first = (len(words) - BLANK_WORDS) // 2
    comma = "," if words[first + BLANK_WORDS - 1].endswith(",") else ""
    return " ".join([*words[:first], f"___{comma}", *words[first + BLANK_WORDS :]])


@torch.no_grad()
def validation_samples(
    scorer: Scorer, tokenizer: Tokenizer, batches: Iterable[PackedBatch], names: Sequence[str]
) -> list[dict[str, Any]]:
    """For each denoiser: its name, prompt, completion (at most `LONGEST_ANSWER` tokens) and target, special tokens by
    name.
    """
    model, precision = scorer.model, scorer.precision
    chosen: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for batch in batches:
        for denoiser, example in zip(batch.denoiser.tolist(), unpack(batch)):
            if denoiser not in chosen or _rank(example[0]) < _rank(chosen[denoiser][0]):
                chosen[denoiser] = example
    if not chosen:
        return []
    order = sorted(chosen)
    info = tokenizer.info
    prompts = [torch.from_numpy(chosen[denoiser][0]) for denoiser in order]
    ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=info.pad_id)
    mask = (ids != info.pad_id).long()
    training = model.training
    model.eval()
    try:
        with precision.autocast():
            answers = model.generate(
                input_ids=ids.to(precision.device),
                attention_mask=mask.to(precision.device),
                max_new_tokens=LONGEST_ANSWER,
                do_sample=False,
                num_beams=1,
                eos_token_id=info.eos_id,
                pad_token_id=info.pad_id,
            ).tolist()
    finally:
        model.train(training)
    silent = (info.pad_id, info.eos_id)
    return [
        {
            "denoiser": names[denoiser],
            "prompt": tokenizer.decode(token for token in chosen[denoiser][0] if token not in silent),
            "completion": tokenizer.decode(token for token in answer if token not in silent),
            "target": tokenizer.decode(token for token in chosen[denoiser][1] if token not in silent),
        }
        for denoiser, answer in zip(order, answers)
    ]


def _rank(inputs: np.ndarray) -> tuple[bool, int]:
    return len(inputs) < LEAST_PROMPT, len(inputs)
