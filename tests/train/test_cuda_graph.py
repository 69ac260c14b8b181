"""Recorded micro-batches leave what launched ones leave: losses, norms, weights, and the random generator."""

import pytest
import torch

from fat5.data import PackedBatch
from fat5.errors import ConfigurationError
from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from fat5.optim import OptimizerConfig
from fat5.tasks import PretrainConfig
from fat5.train.step import StepRunner
from fat5.train.world import World
from made_run import TINY

STEPS, MICRO_BATCHES, TOKENS, EXAMPLES = 4, 3, 128, 8


def batch(seed: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    cuts = [torch.randperm(TOKENS - 1, generator=generator)[: EXAMPLES - 1].sort().values + 1 for _ in range(2)]
    starts = [torch.cat([torch.tensor([0]), cut, torch.tensor([TOKENS])]).to(torch.int32) for cut in cuts]
    ids, labels = (torch.randint(3, 500, (TOKENS,), generator=generator) for _ in range(2))
    none = torch.full((EXAMPLES,), -1)
    return PackedBatch(
        ids, starts[0], TOKENS, labels, starts[1], TOKENS, none.to(torch.int8), none, EXAMPLES, TOKENS
    )  # fmt: skip


def trained(
    cuda_graphs: bool, dropout: float, checkpointing: str = "none", offload: bool = False, precision: str = "bf16"
) -> tuple[list, list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(1)
    device = torch.device("cuda")
    config = PretrainConfig(
        precision=precision,
        compile=True,
        cuda_graphs=cuda_graphs,
        gradient_checkpointing=checkpointing,
        optimizer=OptimizerConfig(offload=offload),
    )
    model = FAT5ForConditionalGeneration(FAT5Config(**TINY | {"vocab_size": 512, "dropout_rate": dropout})).to(device)
    runner = StepRunner(config, model, World(device))
    torch.manual_seed(2)
    results = []
    for step in range(STEPS):
        batches = [batch(MICRO_BATCHES * step + n) for n in range(MICRO_BATCHES)]
        results.append(runner.run(batches, 1.0).read())
    return results, [weight.detach().clone() for weight in model.parameters()], torch.cuda.get_rng_state()


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recorded_is_launched(dropout: float) -> None:
    launched, recorded = (trained(graphs, dropout) for graphs in (False, True))
    for (loss, norm, parts), (own_loss, own_norm, own_parts) in zip(launched[0], recorded[0], strict=True):
        assert own_loss == pytest.approx(loss, rel=1e-3)
        assert own_norm == pytest.approx(norm, rel=1e-2)
        assert own_parts == pytest.approx(parts, rel=1e-3)
    for one, other in zip(launched[1], recorded[1], strict=True):
        torch.testing.assert_close(other, one, rtol=2e-2, atol=2e-3)
    assert torch.equal(launched[2], recorded[2])


@pytest.mark.gpu
@pytest.mark.parametrize(("checkpointing", "offload"), [("selective", False), ("block", False), ("none", True)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_saving_memory_changes_no_loss(dropout: float, checkpointing: str, offload: bool) -> None:
    """Recorded, with dropout: what is computed again is what was computed.

    In fp32: Adam's first updates of entries with almost no gradient would follow the rounding of bf16.
    """
    plain, saving = (
        trained(True, dropout, *how, precision="fp32") for how in (("none", False), (checkpointing, offload))
    )
    for (loss, norm, _), (own_loss, own_norm, _) in zip(plain[0], saving[0], strict=True):
        assert own_loss == pytest.approx(loss, rel=1e-3)
        assert own_norm == pytest.approx(norm, rel=1e-2)
    for one, other in zip(plain[1], saving[1], strict=True):
        if offload:
            assert torch.equal(other, one)
        else:
            torch.testing.assert_close(other, one, rtol=2e-2, atol=2e-3)


def test_refused_without_a_gpu() -> None:
    model = FAT5ForConditionalGeneration(FAT5Config(**TINY | {"vocab_size": 512}))
    config = PretrainConfig(precision="fp32", compile=False, cuda_graphs=True)
    with pytest.raises(ConfigurationError, match="cuda_graphs"):
        StepRunner(config, model, World(torch.device("cpu")))
