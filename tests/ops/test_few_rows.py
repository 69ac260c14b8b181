"""The kernels of a decoding step against float64, on a GPU where there is one and interpreted elsewhere."""

import math

import pytest
import torch

pytest.importorskip("triton")

from fat5.ops.few_rows import attend_memory_reference, attend_own_reference, project_reference
from fat5.ops.triton import few_rows
from fat5.ops.triton.few_rows import attend_memory, attend_own, choose, largest_outputs, project
from pairwise import pairwise

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of the largest entry; roundings of the inputs are no error, those of the result and of normalised rows are.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(HERE, dtype)


def assert_near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


def wide(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if x is None else x.double() for x in tensors]


@pairwise(
    2,
    how=["plain", "norm", "gated", "relu", "added"],
    rows=[1, 8, 37, 70],
    size=[(32, 48), (40, 17), (200, 33)],
    dtype=list(TOLERANCE),
)
def test_project(how, rows, size, dtype):
    width, outputs = size
    x, weight = draw(rows, width, dtype=dtype), draw(outputs, width, dtype=dtype)
    norm = draw(width, dtype=dtype) if how in ("norm", "gated", "relu") else None
    second = draw(outputs, width, dtype=dtype) if how == "gated" else None
    residual = draw(rows, outputs, dtype=dtype) if how == "added" else None
    numbers = {"eps": 1e-6, "scale": 0.25 if how == "norm" else 1.0}
    numbers["activation"] = {"gated": "gelu", "relu": "relu"}.get(how, "none")
    got = project(x, weight, norm=norm, second=second, residual=residual, **numbers)
    narrow = project_reference(x, weight, norm=norm, second=second, residual=residual, **numbers)
    x, weight, norm, second, residual = wide(x, weight, norm, second, residual)
    want = project_reference(x, weight, norm=norm, second=second, residual=residual, **numbers)
    assert got.dtype == dtype
    error, usual = (float((one.double() - want).abs().max()) for one in (got, narrow))
    # The house's rule: twice the error of plain PyTorch in the same precision. It may be lucky with the 48 entries of a
    # row, so half a unit in the last place of the largest is added: the rounding of the result alone.
    largest = float(want.abs().max())
    half = torch.finfo(dtype).eps / 2 * 2.0 ** math.floor(math.log2(largest))
    assert error <= 2 * usual + half + 2e-6 * largest


def test_a_wide_residual_stays_wide_and_float16_is_clamped():
    x, weight = draw(3, 32, dtype=torch.bfloat16), draw(16, 32, dtype=torch.bfloat16)
    assert project(x, weight, residual=draw(3, 16, dtype=torch.float32)).dtype == torch.float32
    assert project(x.float(), weight, norm=draw(32, dtype=torch.float32)).dtype == torch.bfloat16
    big = torch.full((2, 32), 200.0, device=HERE, dtype=torch.float16)
    out = project(big, big, residual=torch.zeros(2, 2, device=HERE, dtype=torch.float16))
    assert torch.equal(out, torch.full_like(out, few_rows.LARGEST_HALF))


def test_nobody_reads_beyond_the_last_row_or_output():
    held = torch.full((40, 32), torch.nan, device=HERE)
    held[:3] = draw(3, 32, dtype=torch.float32)
    weights = torch.full((40, 32), torch.nan, device=HERE)
    weights[:5] = draw(5, 32, dtype=torch.float32)
    assert_near(project(held[:3], weights[:5]), held[:3].double() @ weights[:5].double().t(), torch.float32)


@pairwise(2, width=[8, 64], beams=[1, 3], dtype=list(TOLERANCE))
def test_attend_own(width, beams, dtype, monkeypatch):
    """Token by token, beams changing places, over more keys than a block has."""
    monkeypatch.setattr(few_rows, "KEYS", 8)
    items, heads, capacity = 2, 3, 10
    bias = draw(heads, 2 * capacity - 1, dtype=dtype)
    shape = (items, heads, capacity, beams, width)
    mine = [torch.full(shape, torch.nan, dtype=dtype, device=HERE) for _ in range(2)]
    theirs = [torch.zeros(shape, dtype=torch.float64, device=HERE) for _ in range(2)]
    ancestors = torch.full((items, beams, capacity), 99, device=HERE)
    also = ancestors.clone()
    for position in range(capacity):
        joined = draw(items * beams, 3 * heads * width, dtype=dtype)
        got = attend_own(joined, *mine, bias, torch.tensor([position], device=HERE), ancestors)
        want = attend_own_reference(joined.double(), *theirs, bias.double(), position, also)
        assert_near(got, want, dtype)
        assert torch.equal(ancestors, also)
        sources = torch.randint(beams, (items, beams, 1), device=HERE).expand_as(ancestors)
        for places in (ancestors, also):
            places[..., : position + 1] = places.gather(1, sources)[..., : position + 1]
    assert all(torch.equal(one.double(), two) for one, two in zip(mine, theirs))


@pairwise(2, mask=["none", "ends", "holes", "nothing"], beams=[1, 4], dtype=list(TOLERANCE))
def test_attend_memory(mask, beams, dtype):
    items, heads, length, width = 2, 3, 100, 16
    query = draw(items * beams, heads * width, dtype=dtype)
    keys, values = (draw(items, heads, length, width, dtype=dtype) for _ in range(2))
    ends, bias = torch.full((items,), length, device=HERE), None
    if mask != "none":
        bias = torch.zeros(items, length, device=HERE)
        hidden = {"ends": slice(70, None), "holes": slice(3, None, 2), "nothing": slice(None)}[mask]
        bias[1, hidden] = torch.finfo(torch.float32).min
    want = attend_memory_reference(*wide(query, keys, values, bias))
    if mask == "ends":
        ends[1] = 70
        keys[1, :, 70:] = values[1, :, 70:] = torch.nan
    if mask == "nothing":  # the lowest number swallows the scores: all places count alike
        want[beams:] = values[1].double().mean(1).flatten()
    assert_near(attend_memory(query, keys, values, bias, ends), want, dtype)


@pairwise(2, outputs=[17, 300], dtype=list(TOLERANCE))
def test_greedy_choice(outputs, dtype):
    rows, width, capacity = 5, 32, 4
    weight, norm = draw(outputs, width, dtype=dtype), draw(width, dtype=dtype)
    weight[9] = weight[4]  # the first of equal ones
    written = torch.full((rows, 1 + capacity), 0, device=HERE)
    tokens, lengths = (torch.zeros(rows, dtype=torch.long, device=HERE) for _ in range(2))
    ended = torch.zeros(rows, dtype=torch.int32, device=HERE)
    stop, want = torch.tensor([3, 4, 11, 12], device=HERE), []
    alive = torch.ones(rows, dtype=torch.bool, device=HERE)
    for position in range(capacity):
        x = draw(rows, width, dtype=dtype)
        best, index = largest_outputs(x, weight, norm=norm, eps=1e-6)
        chosen = project(x, weight, norm=norm, eps=1e-6, dtype=torch.float32).argmax(1)
        chosen = torch.where(chosen == 9, 4, chosen)
        choose(best, index, tokens, written, ended, lengths, stop, torch.tensor([position], device=HERE), 0)
        want.append(torch.where(alive, chosen, 0))
        assert torch.equal(tokens, want[-1])
        alive &= ~torch.isin(chosen, stop)
    assert torch.equal(written[:, 1:], torch.stack(want, 1))
    assert torch.equal(ended == 0, alive)
    assert lengths.tolist() == [
        next((n + 1 for n, token in enumerate(row) if token in stop.tolist()), capacity)
        for row in written[:, 1:].tolist()
    ]
