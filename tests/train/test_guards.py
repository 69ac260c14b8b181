"""Guards of a step: which loss is a spike, and memory that runs out, told in one line."""

import json
import math
import random
from dataclasses import asdict

import pytest
import torch

from fat5.errors import FAT5Error
from fat5.train.checkpoint.state import RunState
from fat5.train.guards import SPIKE_STEPS, memory_told, sigmas_above

SIGMA = 6.0


def fed(losses, state=None):
    """A state that has seen losses, and the places of the spikes among them."""
    state = state or RunState()
    return state, [place for place, loss in enumerate(losses) if sigmas_above(state, loss, SIGMA) is not None]


def noisy(count, generator, start=9.0, end=3.0):
    """Losses as of a run: they fall, with a noise of 0.1."""
    return [end + (start - end) * math.exp(-step / 300) + generator.gauss(0.0, 0.1) for step in range(count)]


def test_noise_is_no_spike():
    for seed in range(5):
        assert fed(noisy(4000, random.Random(seed)))[1] == []


@pytest.mark.parametrize("at", [SPIKE_STEPS, 700, 3999])
def test_a_spike_is_one_and_does_not_hide_the_next(at):
    losses = noisy(4000, random.Random(1))
    for place in {at, min(at + 3, 3999)}:
        losses[place] += 3.0
    state, spikes = fed(losses[: at + 1])
    assert spikes == [at]
    assert fed(losses[at + 1 : at + 10], state)[1] == [2] * (at + 3 < 4000)


def test_the_number_is_that_of_standard_deviations():
    generator = random.Random(2)
    state, _ = fed([2.0 + generator.gauss(0.0, 0.1) for _ in range(2000)])
    mean, deviation = state.loss_mean, state.loss_variance**0.5
    assert deviation == pytest.approx(0.1, rel=0.3)
    assert sigmas_above(state, mean + 8 * deviation, SIGMA) == pytest.approx(8.0)
    assert sigmas_above(state, mean - 1.0, SIGMA) is None, "a loss that falls is welcome"


def test_the_first_steps_a_constant_and_a_lasting_rise_are_none():
    assert fed([1.0] * (SPIKE_STEPS - 1) + [50.0])[1] == []
    assert fed([1.0] * 500)[1] == []
    risen = fed([*noisy(1000, random.Random(3)), *(5.5 + random.Random(4).gauss(0.0, 0.1) for _ in range(500))])[1]
    assert 1000 in risen
    assert max(risen) < 1200


def test_it_continues_from_json_to_the_last_bit(tmp_path):
    losses = noisy(1000, random.Random(5))
    whole, _ = fed(losses)
    half, _ = fed(losses[:500])
    again = RunState()
    again.restore(json.loads(json.dumps(asdict(half))), tmp_path)
    assert asdict(fed(losses[500:], again)[0]) == asdict(whole)


def test_memory_that_runs_out_is_told():
    for fault in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")):
        with pytest.raises(FAT5Error, match=r"^out of memory in step 3 \(peak \d+\.\d GiB\)\. Lower"), told():
            raise fault
    with pytest.raises(RuntimeError, match="another"), told():
        raise RuntimeError("another")


def test_memory_that_runs_out_in_a_recording(monkeypatch):
    """The recording of CUDA launches raises its own error on top."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)

    def record():
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(FAT5Error, match=r"^out of GPU memory in step 3 \(peak 3\.0 GiB\)"), told():
        record()


def told():
    return memory_told(torch.device("cpu"), lambda: "step 3")
