"""A tokenizer, and folders of models to convert."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from sources import FAT5_POSITIONS, GATED, SIZES, as_flash_t5, stock
from transformers import ByT5Tokenizer

from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer
from fat5.model import FAT5Config, FAT5ForConditionalGeneration


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer(TokenizerTraining(inputs=["sample:fr"], output_dir=str(folder), vocab_size=1024, rows=200))
    return folder


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Path) -> Any:
    """Makes the folder of a model of some family."""

    def make(family: str) -> Path:
        target = tmp_path / "source"
        if family == "flash_t5":
            as_flash_t5(stock("v1.1"), target)
        elif family in FAT5_POSITIONS:
            config = FAT5Config(**SIZES, **GATED, position_encoding=family)
            FAT5ForConditionalGeneration(config).save_pretrained(target)
        else:
            stock(family).save_pretrained(target)
        if family == "ByT5":
            ByT5Tokenizer().save_pretrained(target)
        else:
            shutil.copytree(tokenizer, target, dirs_exist_ok=True)
        return target

    return make
