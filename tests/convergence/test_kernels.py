"""A small model of the demo's kind trained with every Triton kernel on, and with plain PyTorch: the same losses."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from fat5 import ops
from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from fat5.ops.attention.triton import host as triton_attention
from fat5.ops.attention.triton.configuration import KERNELS, overridden
from fat5.ops.triton.launch import Launch, recording
from fat5.optim import AdamWScale

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCABULARY, TINY = 512, dict(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=2)
# Relative. Sums in another order differ by a rounding of float32 at the first steps (2e-7 was seen), and training
# multiplies differences (6e-5 was seen at a hundred).
FIRST_STEPS, HUNDRED_STEPS = 2e-6, 1e-3
ATTENTION = {"work_list", "forward", "query_gradient", "key_gradient"}
BIAS = {"band", "diagonal", "bins"}
FUSED = {"rms_norm_forward", "rms_norm_backward", "geglu_forward", "geglu_backward", "cross_entropy"}
STEP = {"square_sum", "rate", "adamw_scale"}


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter's time goes by programs: large tiles, and the band not split to fill a GPU."""
    if DEVICE.type == "cuda":
        yield
        return
    monkeypatch.setattr(triton_attention, "BAND_PROGRAMS", 1)
    with overridden(**{kernel: Launch(32, 32, 4, 1) for kernel in KERNELS}):
        yield


def batches(steps: int) -> Iterator[dict]:
    """Packs of two documents and an empty tail, other lengths at each step; the target says the source's rare words."""
    draw = torch.Generator().manual_seed(5)
    frequency = 1.0 / torch.arange(1.0, VOCABULARY - 1)
    for _ in range(steps):
        sources = torch.multinomial(frequency, 56, replacement=True, generator=draw) + 2
        cut = int(torch.randint(8, 32, (1,), generator=draw))
        starts, target_starts = (torch.tensor([0, at, end]).int() for at, end in ((cut, 50), (cut // 2, 24)))
        rare = (sources[:cut].sort().values[-(cut // 2) :], sources[cut:50].sort().values[-(24 - cut // 2) :])
        labels = torch.cat([*rare, torch.full((4,), -100)])
        yield {
            "input_ids": sources, "cu_seqlens": starts, "max_seqlen": 64,
            "labels": labels, "decoder_cu_seqlens": target_starts, "decoder_max_seqlen": 32,
        }  # fmt: skip


def train(steps: int, **options) -> torch.Tensor:
    """The loss of every step."""
    torch.manual_seed(0)
    config = FAT5Config.preset("fat5-demo", vocab_size=VOCABULARY, **(TINY | options))
    model = FAT5ForConditionalGeneration(config).to(DEVICE).train()
    optimizer = AdamWScale(model.parameters(), lr=0.04)
    losses = []
    for batch in batches(steps):
        batch = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def without_and_with(monkeypatch: pytest.MonkeyPatch, steps: int, **options) -> tuple[torch.Tensor, torch.Tensor, set]:
    """Losses of plain PyTorch, losses of the kernels, and the names of the kernels that ran."""
    attention, before = ops.attention, ops.use_kernels("plain")
    try:
        monkeypatch.setattr(ops, "attention", partial(attention, backend="reference"))
        with recording(run=True) as launched:
            plain = train(steps, **options)
        assert not launched
        ops.use_kernels("triton")
        monkeypatch.setattr(ops, "attention", partial(attention, backend="triton"))
        with recording(run=True) as launched:
            kernels = train(steps, **options)
    finally:
        ops.use_kernels(before)
    return plain, kernels, {one.kernel.fn.__name__.removesuffix("_kernel") for one in launched}


@pytest.mark.parametrize(
    ("steps", "options", "own"),
    [
        pytest.param(8, {"dropout_rate": 0.1, "attention_dropout_rate": 0.1}, BIAS, marks=pytest.mark.slow),
        (2, {"position_encoding": "rope", "dropout_rate": 0.0, "attention_dropout_rate": 0.0}, {"rotary"}),
    ],
    ids=["t5-dropout", "rope"],
)
def test_first_steps(monkeypatch, steps, options, own):
    plain, kernels, names = without_and_with(monkeypatch, steps, **options)
    assert names == ATTENTION | FUSED | STEP | own, "every kernel has its part in the losses"
    torch.testing.assert_close(kernels, plain, rtol=FIRST_STEPS, atol=0.0)


@pytest.mark.slow
def test_a_hundred_steps(monkeypatch):
    plain, kernels, _ = without_and_with(monkeypatch, 100, dropout_rate=0.0, attention_dropout_rate=0.0)
    assert plain[-10:].mean() < plain[0] - 0.8, "the model learns, or equal losses would say little"
    torch.testing.assert_close(kernels, plain, rtol=HUNDRED_STEPS, atol=0.0)
