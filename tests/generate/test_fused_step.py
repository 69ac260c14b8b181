"""Decoding by the kernels writes the tokens of stock `generate`; interpreted on a CPU, so of few tokens."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from test_replay import Graph, Shared, batches, graphs  # noqa: F401

from fat5.generate import fused
from fat5.generate.decoding import Decoder
from fat5.generate.replay import SharedStep
from fat5.generate.step import DecoderWeights, Step
from fat5.model import POSITION_ENCODINGS, FAT5Config, FAT5ForConditionalGeneration
from fat5.ops import use_kernels
from fat5.ops.triton.launch import recording
from pairwise import pairwise
from stock import FAMILIES, SIZES, fat5_like, rows, t5_v1_0, t5_v1_1

sys.path.append(str(Path(__file__).parents[1] / "parity"))
from generation import seeded, until_end

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTH = 5
SMALL = {"num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}  # an interpreted program takes a millisecond
MODES = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "penalty": {"repetition_penalty": 1.5},
    "sample": {"do_sample": True, "top_k": 20},
}


@pytest.fixture(autouse=True)
def _kernels_on():
    before = use_kernels("decoding=triton")
    yield
    use_kernels(before)


def prompts() -> dict[str, torch.Tensor]:
    return {name: value[1:, :30].to(HERE) for name, value in rows().items() if name != "labels"}


def decoder(model, cls=Decoder) -> Decoder:
    made = cls(model)
    assert made._weights[None].fused is not None
    return made


@pytest.mark.parametrize("how", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize(
    "family",
    [pytest.param(f, id=n, marks=[] if n == "v1.1" else pytest.mark.slow) for n, f in FAMILIES.items()],
)
def test_the_tokens_are_those_of_stock_generate(family, how):
    model, batch = family(**SMALL).eval().to(HERE), prompts()
    want = seeded(model.generate, **batch, max_new_tokens=LENGTH, **how)
    got = seeded(decoder(model).generate, **batch, max_new_tokens=LENGTH, **how)
    assert until_end(got, 1) == until_end(want, 1)


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_every_position_encoding(encoding):
    torch.manual_seed(0)
    model = FAT5ForConditionalGeneration(FAT5Config(**SIZES | SMALL, position_encoding=encoding)).eval().to(HERE)
    served = encoding in fused.ENCODINGS
    assert (DecoderWeights(model).fused is not None) == served
    if served:
        batch = prompts()
        want, got = (write(**batch, max_new_tokens=LENGTH) for write in (model.generate, decoder(model).generate))
        assert until_end(got, 1) == until_end(want, 1)


@pytest.mark.parametrize("ends", [pytest.param(1, marks=pytest.mark.slow), 2], ids=["one-end", "two-ends"])
def test_rows_end_at_different_times(ends):
    model, batch = t5_v1_1(**SMALL).eval().to(HERE), prompts()
    free = model.generate(**batch, max_new_tokens=9, eos_token_id=98)
    loop, lengths = decoder(model), set()
    for place in (2, 4, 7):
        stops = free[place % 2, place - ends + 1 : place + 1].tolist()
        want = model.generate(**batch, max_new_tokens=9, eos_token_id=stops)
        got = loop.generate(**batch, max_new_tokens=9, eos_token_id=stops)
        written = until_end(got, stops)
        assert written == until_end(want, stops)
        assert not any(any(row[len(until) :]) for row, until in zip(got.tolist(), written))
        lengths |= set(map(len, written))
    assert len(lengths) > 1


@pairwise(
    2,
    family={"v1.1": t5_v1_1, "v1.0": t5_v1_0},
    autocast={"narrow": False, "autocast": True},
    dtype={"bf16": torch.bfloat16, "fp16": torch.float16},
)
def test_logits_in_narrow_types(family, autocast, dtype):
    """As close to float32 as twice the plain step."""
    exact, batch = family(**SMALL).eval().to(HERE), prompts()
    model = family(**SMALL).eval().to(HERE)
    model.load_state_dict(exact.state_dict())
    if not autocast:
        model.to(dtype)
    tokens = torch.randint(3, 90, (LENGTH, 4), device=HERE)
    with torch.inference_mode():
        memory = exact.encoder(**batch)[0]
        use_kernels("plain")
        plain = DecoderWeights(model, dtype if autocast else None), DecoderWeights(exact)
        use_kernels("decoding=triton")
        kernels = DecoderWeights(model, dtype if autocast else None)
        assert kernels.fused is not None
        found = []
        for weights in (plain[1], plain[0], kernels):
            with torch.autocast(HERE.type, dtype, enabled=autocast and weights is not plain[1]):
                narrow = memory if autocast or weights is plain[1] else memory.to(dtype)
                step = Step(weights, narrow, batch["attention_mask"], LENGTH, 2)
                assert (step.fused is not None) == (weights is kernels)
                found.append(torch.stack([step(one, position) for position, one in enumerate(tokens)]).double())
    want, usual, got = found
    assert (got - want).abs().max() <= 2 * (usual - want).abs().max()


@pytest.mark.parametrize(
    ("masked", "beams"),
    [(True, 3), (False, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((True, 1), (False, 3)))],
)
def test_rows_that_a_batch_lacks_change_no_other(beams, masked):
    model, (*_, large, small, _) = t5_v1_1(**SMALL).eval().to(HERE), batches()
    weights = DecoderWeights(model)
    large, small = ({key: value.to(HERE) for key, value in one.items()} for one in (large, small))
    mask = small["attention_mask"] if masked else None
    with torch.inference_mode():
        memory = model.encoder(input_ids=small["input_ids"], attention_mask=mask)[0]
        alone = Step(weights, memory, mask, LENGTH, beams)
        shared = SharedStep(weights, model.encoder(**large)[0], LENGTH, beams)
        assert alone.fused is shared.fused is not None
        for place in (shared.keys, shared.values, shared.memory):
            place.fill_(torch.nan)
        shared.load(memory, mask)
        for position in range(3):
            tokens = torch.randint(3, 90, (2 * beams,), device=HERE)
            want, got = alone(tokens, position), shared(tokens, position)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            if beams > 1:
                sources = torch.randint(0, beams, (2, beams), device=HERE)
                alone.reorder(sources)
                shared.reorder(sources)


@pytest.mark.skipif(HERE.type == "cuda", reason="graphs of the card: test_replay.py")
@pytest.mark.parametrize("how", [{}, pytest.param({"num_beams": 2}, marks=pytest.mark.slow)], ids=["greedy", "beam"])
def test_one_recording_serves_every_position_and_batch(how, graphs):  # noqa: F811
    model = fat5_like(t5_v1_1(**SMALL)).eval()
    some = [{key: value[:2, :20] for key, value in batch.items()} for batch in batches()[4:]]
    want = [decoder(model).generate(**batch, max_new_tokens=LENGTH, **how) for batch in some]
    shared = decoder(model, Shared)
    got = [shared.generate(**batch, max_new_tokens=LENGTH, **how) for batch in some]
    assert all(map(torch.equal, got, want))
    assert len(graphs) == 1


def test_launches_of_a_step():
    """Eight kernels a layer, and nothing of PyTorch's but the embedding and the position."""
    model, batch = t5_v1_1(**SMALL).eval().to(HERE), prompts()
    layers = len(model.decoder.block)
    with torch.inference_mode():
        weights = DecoderWeights(model)
        step = Step(weights, model.encoder(**batch)[0], batch["attention_mask"], LENGTH, 1)
        greedy, advance = step.greedy(torch.zeros(2, dtype=torch.long, device=HERE), torch.tensor([1], device=HERE), 0)
        with recording() as launched, Operators() as operators:
            advance()
    assert Counter(one.name for one in launched) == {"project": 6 * layers + 1, "attend_token": 2 * layers, "choose": 1}
    assert operators.names == {"embedding": 1, "add_": 1}
    assert greedy.position.tolist() == [1]


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts PyTorch's operators that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not any(
            word in name
            for word in ("empty", "view", "detach", "select", "unbind", "as_strided", "alias", "promote", "fill_")
        ):
            self.names[name] += 1
        return func(*args, **kwargs or {})


def test_decoders_that_are_not_plain_take_the_other_step():
    for change in (
        lambda model: model.decoder.block[1].layer[0].SelfAttention.q.register_forward_hook(lambda *_: None),
        lambda model: model.decoder.block[1].layer[0].layer_norm.register_forward_hook(lambda *_: None),
        lambda model: model.decoder.block[0].layer[2].DenseReluDense.wo.double(),
        lambda model: setattr(model.config, "dense_act_fn", "silu"),
    ):
        model = t5_v1_1(**SMALL).eval().to(HERE)
        assert DecoderWeights(model).fused is not None
        change(model)
        assert DecoderWeights(model).fused is None
    use_kernels("plain")
    assert DecoderWeights(t5_v1_1(**SMALL).eval().to(HERE)).fused is None


def test_many_rows_take_the_other_step():
    model = t5_v1_1(**SMALL).eval().to(HERE)
    with torch.inference_mode():
        memory = torch.randn(3, 5, 32, device=HERE)
        weights = DecoderWeights(model)
        assert Step(weights, memory, None, 4, fused.MOST_ROWS // 3).fused is not None
        assert Step(weights, memory, None, 4, fused.MOST_ROWS // 3 + 1).fused is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a GPU")
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("how", MODES.values(), ids=MODES.keys())
def test_on_a_card_both_steps_write_the_same_tokens(how, cuda_graph):
    model = t5_v1_1(d_model=128, d_kv=64, num_heads=2, d_ff=256, vocab_size=9000).eval().cuda()
    some = [{key: value.cuda() for key, value in batch.items()} for batch in batches()]
    found = []
    for kernels in ("decoding=triton", "decoding=plain"):
        use_kernels(kernels)
        loop = Decoder(model)
        assert (loop._weights[None].fused is not None) == (kernels == "decoding=triton")
        torch.manual_seed(5)
        found.append([loop.generate(**one, max_new_tokens=70, cuda_graph=cuda_graph, **how) for one in some])
    assert all(map(torch.equal, *found))
