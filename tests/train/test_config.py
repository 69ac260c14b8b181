"""The configuration: documented, in step with the data room, and the same from YAML, command line and Python."""

import ast
import inspect
from dataclasses import fields, is_dataclass
from itertools import pairwise

import pytest
import torch
import yaml

from fat5.cli.parsing import parse
from fat5.data import BatchConfig, DenoiserConfig
from fat5.errors import ConfigurationError
from fat5.optim import OptimizerConfig, ScheduleConfig
from fat5.tasks import DataConfig, EvaluateConfig, ModelConfig, PretrainConfig, SourceConfig
from fat5.train.cost import flops
from fat5.train.precision import resolve_precision

CLASSES = [
    PretrainConfig,
    DataConfig,
    DenoiserConfig,
    ModelConfig,
    SourceConfig,
    OptimizerConfig,
    ScheduleConfig,
    EvaluateConfig,
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_key_is_documented(cls):
    """A field is followed by a string: what --help says of it."""
    documented = set()
    for part in [one for one in cls.__mro__ if is_dataclass(one)]:
        for statement, following in pairwise(ast.parse(inspect.getsource(part)).body[0].body):
            text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(statement, ast.AnnAssign) and text:
                documented.add(statement.target.id)
    assert documented == {field.name for field in fields(cls)}


def test_shapes_are_those_of_the_loader():
    ours, theirs = DataConfig(), BatchConfig()
    for field in fields(BatchConfig):
        assert getattr(ours, field.name) in ("auto", getattr(theirs, field.name)), field.name


def test_yaml_and_flags_combine(tmp_path):
    content = {
        "output_dir": "runs/x",
        "model": {"preset": "fat5-small", "overrides": {"dropout_rate": 0.1}},
        "data": {
            "sources": [{"path": "a", "weight": 2.0}, {"path": "b"}],
            "mixture": [{"mu": 3.0, "r": 0.15, "prefix": "[R]"}, {"mu": 4.0, "r": 0.0, "max_spans": 1}],
        },
        "optimizer": {"name": "adamw", "betas": [0.9, 0.95]},
        "compile": False,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    words = ["--config", str(tmp_path / "recipe.yaml"), "--optimizer.lr", "1e-3", "--steps", "7", "--compile", "true"]
    config = PretrainConfig(**parse(PretrainConfig, words, "pretrain")).resolved()
    assert (config.steps, config.optimizer.lr, config.compile) == (7, 1e-3, True)
    assert tuple(config.optimizer.betas) == (0.9, 0.95)
    assert [source.weight for source in config.data.sources] == [2.0, 1.0]
    mixture = config.data.denoisers()
    assert [(denoiser.mu, denoiser.prefix) for denoiser in mixture.denoisers] == [(3.0, "[R]"), (4.0, None)]
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    again = PretrainConfig(**parse(PretrainConfig, ["--config", str(tmp_path / "again.yaml")], "pretrain"))
    assert again.to_dict() == config.to_dict()


def test_pure_bf16_needs_an_optimizer_that_compensates():
    data = DataConfig(sources=[SourceConfig("a")])
    config = PretrainConfig("x", precision="bf16-pure", data=data, optimizer=OptimizerConfig("adamw"))
    with pytest.raises(ConfigurationError, match="adamw does not compensate"):
        config.resolved()


@pytest.mark.parametrize(("amx", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_with_matrix_units_trains_in_bfloat16_unless_told_otherwise(monkeypatch, amx, precision):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == precision
    assert resolve_precision("fp32", cpu) == "fp32"
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert resolve_precision("auto", cpu) == "fp32"


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_peak_of_a_cpu_is_that_of_the_precision(monkeypatch, precision, dtype):
    multiplied = []
    monkeypatch.setattr(flops, "product", lambda a, b: multiplied.append(a.dtype))
    assert flops.peak_flops(torch.device("cpu"), precision) > 0
    assert set(multiplied) == {dtype}
