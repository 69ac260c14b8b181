"""The cleaning steps of `fat5 prepare --steps`, from datatrove.

| step | what it does |
|---|---|
| `language=fr` | keeps documents that fastText identifies as that language (needs its model: 126 MB, fetched once) |
| `c4` | C4's line and page rules (Raffel et al. 2020) |
| `gopher_quality` | Gopher's quality rules (Rae et al. 2021), but for its English stop words |
| `gopher_repetition` | Gopher's repetition rules |
| `urls` | drops documents by the blocklists of their `url` column |
| `pii` | replaces e-mail and public IP addresses |
| `minhash` | drops near-duplicates over the whole corpus (MinHash, 14 buckets of 8 hashes of word 5-grams) |

Words and sentences are found by Unicode rules, the same for every language that writes spaces between words, so no
step but `language` needs anything beyond the installation.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from datatrove.pipeline import filters
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.utils.word_tokenizers import WordTokenizer

from fat5.errors import DataError

_WORD = re.compile(r"\w+|[^\w\s]")
_SENTENCE = re.compile(r".+?(?:[.!?…。！？؟।]+[\"'”»)]*(?=\s|$)|\n|$)", re.DOTALL)


class UnicodeWords(WordTokenizer):
    """Words are runs of letters, digits and underscores; sentences end at terminal punctuation or a line break."""

    def __init__(self) -> None:
        super().__init__("unicode")

    def word_tokenize(self, text: str) -> list[str]:
        """Words and single punctuation marks, in order."""
        return _WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """Sentences without the white space around them."""
        return [sentence.strip() for sentence in _SENTENCE.findall(text) if sentence.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of each sentence."""
        return [match.span() for match in _SENTENCE.finditer(text) if match.group().strip()]


class UrlBlocklists(filters.URLFilter):
    """datatrove's URL filter, with the public suffix list that is installed instead of one from the network."""

    def __init__(self) -> None:
        from tldextract import TLDExtract

        super().__init__()
        self.tldextractor = TLDExtract(suffix_list_urls=(), cache_dir=None)

    def filter(self, document: Any) -> Any:
        """Keeps a document unless a blocklist has its URL; DataError if it has no `url`."""
        if not document.metadata.get("url"):
            raise DataError("no column 'url', which the step `urls` reads", where=document.id)
        return super().filter(document)


def build_step(spec: str) -> Any:
    """The datatrove step of a name in `--steps`, except `minhash`, which is several stages."""
    name, _, argument = spec.partition("=")
    steps: dict[str, Callable[[], Any]] = {
        "language": lambda: _language_filter(argument),
        "c4": lambda: filters.C4QualityFilter(language=UnicodeWords()),
        "gopher_quality": lambda: filters.GopherQualityFilter(language=UnicodeWords(), min_stop_words=None),
        "gopher_repetition": lambda: filters.GopherRepetitionFilter(language=UnicodeWords()),
        "urls": _url_blocklists,
        "pii": PIIFormatter,
    }
    return steps[name]()


@lru_cache(maxsize=4)
def _language_filter(languages: str) -> filters.LanguageFilter:
    """Cached between the tasks of a process: its model is large."""
    return filters.LanguageFilter(languages=languages.split("+"))


@lru_cache(maxsize=1)
def _url_blocklists() -> UrlBlocklists:
    """Cached between the tasks of a process: its lists are long."""
    return UrlBlocklists()


def check_models(steps: list[str]) -> None:
    """Loads what the steps need before the corpus is read; DataError if a package or model is missing."""
    for spec in steps:
        if spec == "minhash":
            continue
        try:
            step = build_step(spec)
        except ImportError as error:
            raise DataError(
                "packages are missing", where=f"step {spec}", hint="`pip install 'datatrove[processing]'` has them"
            ) from error
        if spec.startswith("language="):
            try:
                _ = step.model.model
            except Exception as error:  # fsspec, fasttext and the network raise many kinds
                reason = " ".join(str(error).split())[:160] or type(error).__name__
                raise DataError(
                    f"the language identification model cannot be fetched ({reason})",
                    where=f"step {spec}",
                    hint="Run once with a network, or leave this step out",
                ) from error
