"""Every shipped recipe: parsed by each verb it serves, commented key by key, and instantiated at reduced width."""

import tomllib
from pathlib import Path

import pytest
import torch
import yaml

from fat5.cli.main import VERBS
from fat5.cli.parsing import parse
from fat5.cli.recipes import FOLDER, find_recipe, recipe_names
from fat5.data import MixtureOfDenoisers, TokenizerInfo
from fat5.data.shards.prepare import PrepareConfig
from fat5.data.tokenizer.training import TokenizerTraining
from fat5.errors import ConfigurationError
from fat5.model import FAT5ForConditionalGeneration
from fat5.optim import build_optimizer
from fat5.tasks import PretrainConfig
from fat5.tasks.config import DemoConfig
from fat5.tasks.sizes import configure_model, settle
from fat5.train import World

RECIPES = [find_recipe(name) for name in recipe_names()]
INFO = TokenizerInfo(32768, 0, 1, 2, tuple(range(6, 262)), {"[R]": 3, "[S]": 4, "[X]": 5}, "")
PARAMETERS = {"small": 146_832_896, "base": 305_184_000, "large": 973_204_480}
READERS = {"tokenizer": TokenizerTraining, "prepare": PrepareConfig, "pretrain": PretrainConfig}


def test_the_recipes_are_there() -> None:
    assert {"demo", "minimal-any-language", "fr/small", "fr/base", "fr/large"} <= set(recipe_names())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_section_is_read_by_its_verb(path: Path) -> None:
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(sections) <= set(VERBS)
    for verb in sections:
        values = parse(READERS[verb], ["--config", str(path)], verb)
        READERS[verb](**values)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_makes_a_model_an_optimizer_and_a_mixture(path: Path) -> None:
    config = PretrainConfig(**parse(PretrainConfig, ["--config", str(path)], "pretrain"))
    config = settle(config, World(torch.device("cpu")), stand_in=INFO)
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
        sections = yaml.safe_load(find_recipe(f"fr/{name}").read_text(encoding="utf-8"))
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
    config = DemoConfig(**parse(DemoConfig, ["--config", "demo"], "demo"))
    assert config.pretrain.model.preset == "fat5-demo"
    assert config.tokenizer.inputs == ["sample:fr"]


def test_a_name_finds_the_recipe_whatever_the_folder_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make demo` leaves a folder named demo, and a file of that name is given with its suffix or its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "fr").mkdir()
    for name in ("demo", "fr/base"):
        assert find_recipe(name) == FOLDER / f"{name}.yaml"
    (tmp_path / "demo.yaml").write_text("steps: 7\n")
    assert parse(PretrainConfig, ["--config", "demo.yaml"], "pretrain")["steps"] == 7
    assert parse(PretrainConfig, ["--config", "demo"], "pretrain")["steps"] == 600
    (tmp_path / "demo").rmdir()
    (tmp_path / "demo").write_text("steps: 8\n")
    assert parse(PretrainConfig, ["--config", "./demo"], "pretrain")["steps"] == 8
    assert parse(PretrainConfig, ["--config", "demo"], "pretrain")["steps"] == 600


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base", "Did you mean fr/base?"),
        ("demmo", "Did you mean demo?"),
        ("configs/fr/large.yaml", "Did you mean fr/large?"),
        ("mime.yaml", "Did you mean mine.yaml?"),
        ("quite/other.yaml", "Shipped recipes: demo, fr/base"),
        ("run", "is a folder, not a recipe. Give the file: --config run/config.yaml"),
        ("empty", "is a folder, not a recipe. Shipped recipes: demo"),
        ("..", "is a folder"),
    ],
)
def test_an_unknown_name_lists_what_there_is(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("steps: 7\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("steps: 7\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError) as refused:
        parse(PretrainConfig, ["--config", name], "pretrain")
    assert said in str(refused.value)
    assert str(refused.value).startswith(f"{name}: ")


def test_the_demo_without_a_recipe_takes_its_own() -> None:
    silent = DemoConfig(**parse(DemoConfig, [], "demo", recipe="demo"))
    named = DemoConfig(**parse(DemoConfig, ["--config", "demo"], "demo", recipe="fr/base"))
    assert silent == named
    assert silent.pretrain.steps == 600


def test_every_recipe_is_package_data() -> None:
    """A wheel holds what matches `package-data`; the patterns must reach each recipe and its folder."""
    packaged = tomllib.loads((FOLDER.parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    matched = {path for pattern in packaged["package-data"]["fat5"] for path in FOLDER.parent.glob(pattern)}
    assert set(RECIPES) <= matched
