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
from fat5.train.run_directory import RunDirectory


def export(model: Any, tokenizer: Path, run: RunDirectory, facts: CardFacts) -> None:
    """Writes a folder that transformers' auto classes load; an older one stays until the new one is complete.

    The target of the `facts` for the card is set here.
    """
    with whole_folder(run.model) as folder:
        try:
            with quiet():
                model.save_pretrained(folder)
        except SafetensorError as error:  # its only fault here is the disk's
            raise OSError(f"{run.model} cannot be written: {error}") from error
        for file in sorted(tokenizer.iterdir()):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        if run.plot.is_file():
            shutil.copyfile(run.plot, folder / PLOT)
        stock = json.loads((folder / "config.json").read_text())["model_type"] != "fat5"
        write_card(folder, replace(facts, target="hf" if stock else "fat5"))
