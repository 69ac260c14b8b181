"""Every shipped recipe: parsed by each verb it serves, commented key by key, and instantiated at reduced width."""

from pathlib import Path

import pytest
import torch
import yaml

from fat5.cli.main import VERBS
from fat5.cli.parsing import parse
from fat5.data import MixtureOfDenoisers, TokenizerInfo
from fat5.data.prepare import PrepareConfig
from fat5.data.tokenizer_training import TokenizerTraining
from fat5.model import FAT5ForConditionalGeneration
from fat5.optim import build_optimizer
from fat5.tasks.demo import DemoConfig
from fat5.train import PretrainConfig
from fat5.train.pretraining import configure_model

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(CONFIGS.rglob("*.yaml"))
INFO = TokenizerInfo(32768, 0, 1, 2, tuple(range(6, 262)), {"[R]": 3, "[S]": 4, "[X]": 5}, "")
PARAMETERS = {"small": 146_832_896, "base": 305_184_000, "large": 973_204_480}
READERS = {"tokenizer": TokenizerTraining, "prepare": PrepareConfig, "pretrain": PretrainConfig}


def test_the_recipes_are_there() -> None:
    names = {str(path.relative_to(CONFIGS)) for path in RECIPES}
    assert {"demo.yaml", "minimal-any-language.yaml", "fr/small.yaml", "fr/base.yaml", "fr/large.yaml"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_section_is_read_by_its_verb(path: Path) -> None:
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(sections) <= set(VERBS)
    for verb in sections:
        values = parse(READERS[verb], ["--config", str(path)], verb)
        READERS[verb](**values)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_makes_a_model_an_optimizer_and_a_mixture(path: Path) -> None:
    config = PretrainConfig(**parse(PretrainConfig, ["--config", str(path)], "pretrain")).resolved()
    with torch.device("meta"):
        whole = FAT5ForConditionalGeneration(configure_model(config, INFO))
    if path.stem in PARAMETERS:
        assert whole.num_parameters() == PARAMETERS[path.stem]
    config.model.overrides |= {"d_model": 32, "d_ff": 64, "num_heads": 2, "d_kv": 16}
    model = FAT5ForConditionalGeneration(configure_model(config, INFO))
    optimizer = build_optimizer(config.optimizer, model)
    ids = torch.randint(300, 1000, (24,))
    lengths = torch.tensor([0, 12, 24], dtype=torch.int32)
    packed = {"cu_seqlens": lengths, "max_seqlen": 12, "decoder_cu_seqlens": lengths, "decoder_max_seqlen": 12}
    loss = model(input_ids=ids, labels=ids, **packed).loss
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert isinstance(config.data.denoisers(), MixtureOfDenoisers)


def test_the_french_recipes_name_their_data() -> None:
    for name in PARAMETERS:
        sections = yaml.safe_load((CONFIGS / "fr" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert sections["tokenizer"]["inputs"] == ["oscar-corpus/OSCAR-2301"]
        assert sections["tokenizer"]["rows"] == 1_000_000
        assert sections["tokenizer"]["vocab_size"] == 32768
        assert sections["prepare"]["inputs"] == ["uonlp/CulturaX"]
        assert sections["pretrain"]["data"]["mixture"] == "fat5"


@pytest.mark.parametrize("path", [path for path in RECIPES if path.parent.name == "fr"], ids=lambda path: path.stem)
def test_a_comment_a_key(path: Path) -> None:
    silent = {"tokenizer:", "prepare:", "pretrain:", "model:", "overrides:", "data:", "optimizer:", "schedule:"}
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and line[0] == " "]
    bare = [line for line in lines if "#" not in line and line.strip() not in silent]
    assert not bare


def test_the_demo_reads_its_whole_recipe() -> None:
    config = DemoConfig(**parse(DemoConfig, ["--config", str(CONFIGS / "demo.yaml")], "demo"))
    assert config.pretrain.model.preset == "fat5-demo"
    assert config.tokenizer.inputs == ["sample:fr"]
