"""The model folder that a run leaves: weights, configuration, tokenizer and card, all of it or nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fat5.files import whole_folder
from fat5.model import quiet
from fat5.model.card import PLOT, CardFacts, write_card


def export(model: Any, tokenizer: Path, target: Path, facts: CardFacts, plot: Path | None = None) -> None:
    """Writes a folder that transformers' auto classes load; an older one stays until the new one is complete.

    Args:
        facts: for the card; `target` is set here.
        plot: a picture that the card shows.
    """
    with whole_folder(target) as folder:
        try:
            with quiet():
                model.save_pretrained(folder)
        except SafetensorError as error:  # its only fault here is the disk's
            raise OSError(f"{target} cannot be written: {error}") from error
        for file in sorted(tokenizer.iterdir()):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        if plot is not None:
            shutil.copyfile(plot, folder / PLOT)
        stock = json.loads((folder / "config.json").read_text())["model_type"] != "fat5"
        write_card(folder, replace(facts, target="hf" if stock else "fat5"))
