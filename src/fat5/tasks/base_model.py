"""The model that a run begins from: a hash of its weights, and the tokenizer that a checkpoint was trained with."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from fat5.data import load_tokenizer
from fat5.errors import TokenizerError
from fat5.model.loading import readable, weight_files
from fat5.train.checkpoint.state import TRAINER, read_trainer_state
from fat5.yaml_text import read_yaml

SAMPLE_BYTES = 1 << 20
"""Of each end of a file of weights: two states of a training differ in every tensor."""


def fingerprint(folder: Path) -> str:
    """SHA-256 of config.json, and of the size and both ends of each file of weights: quick for any size."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    with readable(folder):
        for path in weight_files(folder):
            size = path.stat().st_size
            with path.open("rb") as file:
                digest.update(f"{size}\n".encode() + file.read(SAMPLE_BYTES))
                file.seek(max(0, size - SAMPLE_BYTES))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def find_tokenizer(checkpoint: Path, prepared: Sequence[str] = (), key: str = "tokenizer") -> Path:
    """The folder of a checkpoint's tokenizer: in prepared data, in the checkpoint's run, or in the data of that run.

    Args:
        checkpoint: a folder `step-N`.
        prepared: folders made by `fat5 prepare`, which are looked at first.
        key: of the configuration, which the error names.

    Raises:
        TokenizerError: none of these folders has a tokenizer of the hash that the checkpoint recorded.
    """
    if (checkpoint / TRAINER).is_file():
        wanted, run = read_trainer_state(checkpoint)["configuration"].get("tokenizer"), checkpoint.absolute().parents[1]
        recipe = read_yaml(run / "config.yaml", run / "config.yaml") if (run / "config.yaml").is_file() else {}
        data = recipe.get("data")
        sources = data.get("sources") if isinstance(data, dict) else None
        own = [one["path"] for one in sources or [] if isinstance(one, dict) and isinstance(one.get("path"), str)]
        for place in [*(Path(path) / "tokenizer" for path in [*prepared, *own]), run / "model"]:
            if _hash(place) == wanted:
                return place
    raise TokenizerError(
        "holds no tokenizer", where=checkpoint, hint=f"Give the one that the model was trained with: --{key} DIR"
    )


def _hash(folder: Path) -> str | None:
    try:
        return load_tokenizer(folder).info.sha256 if folder.is_dir() else None
    except TokenizerError:
        return None
