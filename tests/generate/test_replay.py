"""One step for many batches: other widths and fewer rows change no token, and a recording that fails costs nothing."""

import logging
from functools import partial

import pytest
import torch

from fat5.generate import replay
from fat5.generate.decoding import Decoder
from fat5.generate.replay import FEWEST_BATCHES, SharedStep, bucket, pays
from fat5.generate.step import DecoderWeights, Step
from fat5.model import POSITION_ENCODINGS, FAT5Config, FAT5ForConditionalGeneration
from stock import SIZES, fat5_like, t5_v1_1

# Past WINDOW, so that there are two windows.
LENGTH = 40
MODES = pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"repetition_penalty": 1.5}, {"do_sample": True, "top_k": 20}],
    ids=["greedy", "beam", "penalty", "sample"],
)


class Shared(Decoder):
    """What `cuda_graph=True` does on CUDA, with a plain call in place of a graph."""

    def _step(self, *shape, shared):
        return super()._step(*shape, shared=True)


class Graph:
    """In place of a CUDA graph: the same launches on the same addresses, and its own place for the logits."""

    def __init__(self, run) -> None:
        self.run, self.step = run, run.func.__self__ if isinstance(run, partial) else run.__self__.step
        self.window = run.args[2] if isinstance(run, partial) else "greedy"
        self.logits = torch.full_like(run(), torch.nan)
        self.addresses = self.read()

    def read(self) -> list[int]:
        step = self.step
        places = [step.tokens, step.position, step.memory_bias, step.memory, step.memory_ends, step.keys, step.values]
        return [place.data_ptr() for place in [*places, step.ancestors]]

    def replay(self) -> None:
        assert self.read() == self.addresses
        self.logits.copy_(self.run())


@pytest.fixture
def graphs(monkeypatch) -> list[Graph]:
    """Those that were recorded."""
    made: list[Graph] = []
    plain = SharedStep.__init__

    def begin(self, *given):
        plain(self, *given)
        self.records = True

    def record(run, _device):
        warm = run()
        made.append(Graph(run))
        return made[-1], made[-1].logits, warm

    monkeypatch.setattr(SharedStep, "__init__", begin)
    monkeypatch.setattr(replay, "record", record)
    return made


def batches(sizes=((3, 150), (3, 140), (3, 129), (3, 90), (2, 20), (1, 1))) -> list[dict[str, torch.Tensor]]:
    """Prompts of these rows and longest lengths, the others shorter: two buckets, the last batches smaller."""
    torch.manual_seed(3)
    made = []
    for rows, longest in sizes:
        lengths = torch.tensor([max(1, longest - 7 * row) for row in range(rows)])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        made.append({"input_ids": torch.randint(3, 90, (rows, longest)) * mask, "attention_mask": mask})
    return made


def written(decoder: Decoder, some: list[dict[str, torch.Tensor]], **how) -> list[list[list[int]]]:
    torch.manual_seed(5)
    return [decoder.generate(**batch, max_new_tokens=LENGTH, **how).tolist() for batch in some]


@MODES
def test_shared_steps_write_the_same_tokens(how):
    model = t5_v1_1().eval()
    assert written(Shared(model), batches(), **how) == written(Decoder(model), batches(), **how)


@MODES
def test_replayed_steps_write_the_same_tokens_from_one_recording_a_window_and_shape(how, graphs):
    model = fat5_like(t5_v1_1()).eval()
    assert written(Shared(model), batches(), eos_token_id=[], **how) == written(
        Decoder(model), batches(), eos_token_id=[], **how
    )
    assert [graph.window for graph in graphs] == [32, 40, 32, 40]
    assert [len(graph.step.memory_bias[0, 0]) for graph in graphs] == [256, 256, 128, 128]


@pytest.mark.parametrize(
    ("how", "encoding"),
    [
        # Beams know nothing of positions.
        pytest.param(how, encoding, id=f"{name}-{encoding}", marks=pytest.mark.slow if how and encoding != "t5" else ())
        for name, how in (("greedy", {}), ("beam", {"num_beams": 3}))
        for encoding in POSITION_ENCODINGS
    ],
)
def test_every_position_encoding(encoding, how):
    torch.manual_seed(0)
    model = FAT5ForConditionalGeneration(FAT5Config(**SIZES, position_encoding=encoding)).eval()
    assert written(Shared(model), batches(), **how) == written(Decoder(model), batches(), **how)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_rows_that_a_batch_lacks_change_no_other(beams, masked):
    model, (large, _, _, small, *_) = t5_v1_1().eval(), batches()
    weights = DecoderWeights(model)
    small = {key: value[:2] for key, value in small.items()}
    mask = small["attention_mask"] if masked else None
    with torch.inference_mode():
        memory = model.encoder(input_ids=small["input_ids"], attention_mask=mask)[0]
        alone = Step(weights, memory, mask, LENGTH, beams)
        shared = SharedStep(weights, model.encoder(**large)[0], LENGTH, beams)
        # What an earlier batch left must not be read, whatever it is.
        for place in (shared.keys, shared.values, *shared.memory_keys, *shared.memory_values):
            place.fill_(torch.nan)
        shared.load(memory, mask)
        for position in range(LENGTH):
            tokens = torch.randint(3, 90, (2 * beams,))
            want, got = alone(tokens, position), shared(tokens, position)
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            if beams > 1:
                sources = torch.randint(0, beams, (2, beams))
                alone.reorder(sources)
                shared.reorder(sources)


def test_weights_cast_once_are_those_of_autocast(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # the layout of float32
    model, batch = t5_v1_1().eval(), batches()[3]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        memory = model.encoder(**batch)[0]
        cast, plain = (
            Step(weights, memory, batch["attention_mask"], LENGTH, 1)
            for weights in (DecoderWeights(model, torch.bfloat16), DecoderWeights(model))
        )
        assert cast.weights.layers[0].query_key_value.joined.dtype == torch.bfloat16
        for position in range(4):
            tokens = torch.randint(3, 90, (3,))
            assert torch.equal(cast(tokens, position), plain(tokens, position))


def test_a_recording_that_fails_falls_back(graphs, monkeypatch, caplog):
    model = t5_v1_1().eval()
    made = []

    def fail(run, _device):
        made.append(run.args[2])
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "record", fail)
    decoder = Shared(model)
    with caplog.at_level(logging.WARNING, "fat5"):
        assert written(decoder, batches()) == written(Decoder(model), batches())
    assert made == [32]  # it is not tried again
    assert "without CUDA graphs: operation not permitted" in caplog.text


@pytest.mark.parametrize("batch", [1, 2])
def test_a_replay_that_differs_falls_back(batch, graphs, monkeypatch, caplog):
    # As with a stale address: from some batch on, the graph writes something else.
    def differ(self):
        self.logits.copy_(self.run())
        if self.step.batches >= batch:
            self.logits.mul_(1.5)

    model = t5_v1_1().eval()
    monkeypatch.setattr(Graph, "replay", differ)
    with caplog.at_level(logging.WARNING, "fat5"):
        assert written(Shared(model), batches()) == written(Decoder(model), batches())
    assert "a replayed step differ" in caplog.text


def test_too_little_memory_for_a_shared_step_takes_a_new_one(monkeypatch):
    def refuse(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = t5_v1_1().eval()
    monkeypatch.setattr(SharedStep, "__init__", refuse)
    assert written(Shared(model), batches()) == written(Decoder(model), batches())


def test_widths_and_when_recording_pays():
    assert [bucket(length) for length in (1, 128, 129, 256, 1000, 1024, 1025, 3000)] == [
        128, 128, 256, 256, 1024, 1024, 2048, 3072,
    ]  # fmt: skip
    assert pays(torch.device("cuda"), FEWEST_BATCHES)
    assert not pays(torch.device("cuda"), FEWEST_BATCHES - 1)
    assert not pays(torch.device("cpu"), 1000)


class Uncaptured(Decoder):
    """A shared step whose launches are not recorded."""

    def _step(self, *shape, shared):
        step = super()._step(*shape, shared=shared)
        step.records = False
        return step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a GPU")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@MODES
def test_cuda_graphs_of_many_batches(how, autocast, caplog):
    model = fat5_like(t5_v1_1()).eval().cuda()
    some = [{key: value.cuda() for key, value in batch.items()} for batch in batches()]
    found = []
    for decoder in (Decoder(model), Uncaptured(model)):
        torch.manual_seed(5)
        found.append([])
        for batch in some:
            # As in predictions, autocast ends behind each batch, and what it cast goes.
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                tokens = decoder.generate(**batch, max_new_tokens=LENGTH, cuda_graph=True, **how)
            found[-1].append(tokens.tolist())
            torch.full((1 << 24,), torch.nan, device="cuda")  # over memory that was given back
    assert found[0] == found[1]
    assert not caplog.text, "recording failed"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a GPU")
@MODES
def test_cuda_graphs_write_what_steps_of_one_batch_write(how):
    model = fat5_like(t5_v1_1()).eval().cuda()
    some = [{key: value.cuda() for key, value in batch.items()} for batch in batches()]
    assert written(Decoder(model), some, cuda_graph=True, **how) == written(Decoder(model), some, **how)
