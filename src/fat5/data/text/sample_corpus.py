"""The sample corpus that ships with FAT5: paragraphs of the Debian Administrator's Handbook, aligned by `id`."""

from pathlib import Path

from fat5.errors import DataError

LANGUAGES = ("fr", "en", "de")


def sample_path(language: str = "fr") -> Path:
    """Path of the sample corpus in one language (`fr`, `en`, `de`): gzipped JSON lines of `id`, `chapter`, `text`.

    Raises:
        DataError: no sample in that language.
    """
    if language not in LANGUAGES:
        raise DataError(f"no sample corpus in {language!r}", hint=f"There is {', '.join(LANGUAGES)}")
    return Path(__file__).parents[1] / "sample" / f"{language}.jsonl.gz"
