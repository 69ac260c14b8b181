"""Training a tokenizer: BPE or Unigram with byte fallback, lossless on any text, laid out for T5 and UL2.

Ids: `<pad>` 0, `</s>` 1, `<unk>` 2, the mode tokens, 256 sentinels, 256 bytes, then what was learned. The text is first
cut by `PATTERN` into words, single digits, runs of punctuation and runs of white space; learned tokens never cross
these cuts. No special token and no byte token fits between two cuts (each mixes letters or digits with punctuation),
so neither can be spelled by a document. Spaces are kept as they are and a character that was not learned is written
as its UTF-8 bytes, so decoding gives back every text byte for byte.
"""

import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np

from fat5.data.config import TokenizerTraining
from fat5.data.text.corpus import Corpus, open_corpus
from fat5.data.tokenizer.json_file import EOS, MODES, MULTIPLE, PAD, UNK, added_token, append_eos
from fat5.data.tokenizer.loading import Tokenizer
from fat5.errors import ConfigurationError, DataError, RunDirectoryError, check_writable
from fat5.files import whole_folder

SENTINELS = 256
SMALLEST_VOCABULARY = 640  # 518 ids are special tokens and bytes; the next multiple that leaves room to learn
LARGEST_VOCABULARY = 1 << 16
# An elided word keeps its apostrophe (l'|ordinateur); a word keeps the one space before it; digits stand alone.
PATTERN = (
    r" ?[\p{L}\p{M}]+['’](?=\p{L})"
    r"| ?[\p{L}\p{M}]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
ALPHABET_COVERAGE = 0.9999
ALPHABET_CHARACTERS = 200_000_000
REPORT_ROWS = 5_000
# Longest learned token, in characters, so that a script without spaces gets no tokens for whole sentences.
LONGEST_PIECE = 24
# Unigram takes about 90 s of one core for each million characters of different words: 15 minutes at most.
# A language without spaces reaches the bound after about as much text, others after gigabytes.
UNIGRAM_CHARACTERS = 10_000_000
_WORD = re.compile(rf"\S{{1,{LONGEST_PIECE}}}")


def train_tokenizer(config: TokenizerTraining, progress: bool = False) -> dict[str, Any]:
    """Trains and saves a tokenizer; returns the report: vocabulary, documents, tokens per word and byte, unknown rate.

    Raises:
        ConfigurationError: an impossible vocabulary size.
        DataError: the corpus is empty or cannot be read.
        RunDirectoryError: `output_dir` holds something else.
    """
    _check(config)
    output = check_writable(config.output_dir, folder=True, key="output_dir")
    if output.exists() and any(output.iterdir()):
        raise RunDirectoryError("holds something already", where=output, hint="Choose a new --output_dir")
    corpus = open_corpus(config.inputs, config.corpus)
    content, learned = learn(corpus, config, progress)
    bad_rows = corpus.bad_rows.count
    tokenizer = Tokenizer(content, None, {}, output)
    report = {
        "model": config.model,
        "vocab_size": tokenizer.info.vocab_size,
        "sha256": tokenizer.info.sha256,
        "bad_rows": bad_rows,
        "learned_documents": learned,
        **measure(tokenizer, corpus.rows(min(config.rows, REPORT_ROWS))),
    }
    settings = asdict(config) | {"report": report}
    del settings["output_dir"]
    with whole_folder(output) as folder:
        tokenizer.save(folder)
        text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
        (folder / "training.json").write_text(text, encoding="utf-8")
    return report


def learn(corpus: Corpus, config: TokenizerTraining, progress: bool = False) -> tuple[dict[str, Any], int]:
    """The content of `tokenizer.json`, and from how many texts it is learned: the first of a corpus, at most
    `config.rows`; for Unigram until their different words hold `UNIGRAM_CHARACTERS`.
    """
    from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    specials = [PAD, EOS, UNK, *MODES, *(f"<extra_id_{index}>" for index in range(SENTINELS))]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    room = config.vocab_size - len(specials) - len(byte_tokens)
    trainer: Any
    if config.model == "bpe":
        letters = alphabet(corpus.rows(config.rows), room // 2, config.normalization == "nfc")
        backend = Backend(models.BPE(unk_token=UNK, byte_fallback=True))
        trainer = trainers.BpeTrainer(
            vocab_size=room,
            initial_alphabet=letters,
            limit_alphabet=len(letters),
            max_token_length=LONGEST_PIECE,
            show_progress=progress,
        )
    else:
        backend = Backend(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=room + 1,
            special_tokens=[UNK],
            unk_token=UNK,
            max_piece_length=LONGEST_PIECE,
            show_progress=progress,
        )
    if config.normalization == "nfc":
        backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    # Unigram weighs all pieces of a word at once, so it learns from short parts of text without spaces.
    parts = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{LONGEST_PIECE}}}"), "isolated")
    backend.pre_tokenizer = words if config.model == "bpe" else pre_tokenizers.Sequence([words, parts])
    texts = _Counted(corpus.rows(config.rows), UNIGRAM_CHARACTERS if config.model == "unigram" else None)
    backend.train_from_iterator(iter(texts), trainer)
    backend.pre_tokenizer = words
    if not texts.count:
        raise DataError("no text in this corpus", where=corpus.name, hint="Every document is empty")
    content: dict[str, Any] = json.loads(backend.to_str())
    learned = content["model"]["vocab"]
    if config.model == "bpe":
        pieces = sorted(learned, key=learned.get)
        vocabulary = {token: index for index, token in enumerate(_filled([*specials, *byte_tokens, *pieces]))}
        content["model"] |= {"vocab": vocabulary, "unk_token": UNK, "byte_fallback": True}
    else:
        scored = sorted((piece for piece in learned if piece[0] != UNK), key=lambda piece: -piece[1])[:room]
        floor = min((score for _, score in scored), default=0.0)
        scores = dict([*((token, 0.0) for token in specials), *((token, floor) for token in byte_tokens), *scored])
        vocabulary = {token: index for index, token in enumerate(_filled(list(scores)))}
        scores = {token: scores.get(token, floor) for token in vocabulary}
        content["model"] |= {"vocab": list(scores.items()), "unk_id": vocabulary[UNK], "byte_fallback": True}
    content["added_tokens"] = [added_token(vocabulary[token], token) for token in specials]
    content["post_processor"] = append_eos(vocabulary[EOS])
    content["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    return content, texts.count


def alphabet(texts: Iterable[str], most: int, compose: bool = False) -> list[str]:
    """The characters that get an id: printable ASCII, then the most frequent ones until 99.99% of the text is covered.

    They are counted in the first 200 million characters; ties are broken by code point.
    """
    counts: Counter[str] = Counter()
    size = 0
    for text in texts:
        counts.update(unicodedata.normalize("NFC", text) if compose else text)
        size += len(text)
        if size > ALPHABET_CHARACTERS:
            break
    ordered = sorted(counts, key=lambda letter: (-counts[letter], letter))
    covered = np.cumsum([counts[letter] for letter in ordered]) / max(1, counts.total())
    frequent = ordered[: int(np.searchsorted(covered, ALPHABET_COVERAGE)) + 1]
    always = [*map(chr, range(32, 127)), "\n", "\t"]
    return list(dict.fromkeys([*always, *frequent]))[: max(most, len(always))]


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """Tokens per word (split at white space) and per byte of some texts, and the shares of unknown and byte tokens."""
    byte_ids = np.zeros(tokenizer.info.vocab_size, bool)
    ids = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    byte_ids[[index for index in ids if index is not None]] = True
    documents = words = size = tokens = unknown = fallback = 0
    texts = iter(texts)
    while batch := list(islice(texts, 512)):
        found, lengths = tokenizer.encode_documents(batch)
        documents += len(lengths)
        words += sum(len(text.split()) for text in batch)
        size += sum(len(text.encode("utf-8", "surrogatepass")) for text in batch)
        tokens += len(found)
        unknown += int((found == tokenizer.info.unk_id).sum())
        fallback += int(byte_ids[found].sum())
    return {
        "documents": documents,
        "tokens_per_word": round(tokens / max(1, words), 4),
        "tokens_per_byte": round(tokens / max(1, size), 4),
        "unknown_rate": round(unknown / max(1, tokens), 6),
        "byte_fallback_rate": round(fallback / max(1, tokens), 6),
    }


class _Counted:
    """Passes texts on and counts them, until their different words hold `most` characters."""

    def __init__(self, texts: Iterator[str], most: int | None) -> None:
        self.texts, self.most, self.count = texts, most, 0

    def __iter__(self) -> Iterator[str]:
        words: set[str] = set()
        size = 0
        for text in self.texts:
            self.count += 1
            yield text
            if self.most is not None:
                new = set(_WORD.findall(text)) - words
                words |= new
                size += sum(map(len, new))
                if size >= self.most:
                    break
        if self.most is not None:
            said = f"learning from {self.count:,} documents, {size:,} characters of different words"
            sys.stderr.write(said + (", the most that Unigram takes\n" if size >= self.most else "\n"))


def _filled(tokens: list[str]) -> list[str]:
    """Tokens, and unused ones up to the next multiple of 128."""
    missing = -len(tokens) % MULTIPLE
    return [*tokens, *(f"<unused_{index}>" for index in range(missing))]


def _check(config: TokenizerTraining) -> None:
    size = config.vocab_size
    if size > LARGEST_VOCABULARY:
        raise ConfigurationError(
            f"vocab_size {size:,} is above 65,536, the most that 2-byte shards hold",
            hint="32,768 serves most languages",
        )
    if size % MULTIPLE or size < SMALLEST_VOCABULARY:
        near = max(SMALLEST_VOCABULARY, round(size / MULTIPLE) * MULTIPLE)
        raise ConfigurationError(
            f"vocab_size {size:,} is not a multiple of {MULTIPLE} from {SMALLEST_VOCABULARY:,} up",
            hint=f"{near:,} is the nearest",
        )
    if config.rows < 1:
        raise ConfigurationError("rows must be at least 1")
