"""fat5.accelerate(cuda_graphs=True): replays give what runs give, and what a replay would miss is run.

On a CPU a plain call stands in place of a graph: on the same addresses, with its own place for the result.
"""

import copy
import logging
import pickle

import pytest
import torch

import fat5
from fat5.errors import FAT5Error
from fat5.stock import accelerated, recordings
from fat5.stock.recordings import MOST, room
from stock import ENCODERS, LOGITS_TOLERANCE, difference, encoder, rows, t5_v1_1

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a GPU")


class Graph:
    """In place of a CUDA graph."""

    def __init__(self, run) -> None:
        self.run, self.out, self.replays = run, torch.full_like(run(), torch.nan), 0

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        self.replays += 1
        self.out.copy_(self.run())


@pytest.fixture
def graphs(monkeypatch) -> list[Graph]:
    """Those that were recorded."""
    made: list[Graph] = []

    def record(run, _device, _pool):
        warm = run()
        made.append(Graph(run))
        return made[-1], made[-1].out, warm

    monkeypatch.setattr(accelerated, "check_device", lambda: None)
    monkeypatch.setattr(recordings, "DEVICE", "cpu")
    monkeypatch.setattr(recordings, "record", record)
    return made


def batch(lengths, width: int = 96) -> dict[str, torch.Tensor]:
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(2, 99, mask.shape) * mask, "attention_mask": mask}


BATCHES = ((96, 96), (90, 60), (90, 60), (96, 96), (96, 96), (80, 65), (3, 7), (3, 70), (9, 70), (96, 96))


def states(model, some):
    with torch.no_grad():
        return [model(**one).last_hidden_state for one in some]


@pytest.mark.parametrize("family", ENCODERS.values(), ids=ENCODERS.keys())
@pytest.mark.parametrize("computed", [True, False], ids=["padding", "packed"])
def test_replays_give_the_states_of_the_stock_class(family, computed, graphs):
    stock = family().eval()
    fast = fat5.accelerate(copy.deepcopy(stock), cuda_graphs=True, compute_padding=computed)
    some = [batch(lengths) for lengths in BATCHES]
    got = states(fast, some)  # kept until the end: no replay writes over an earlier answer
    for one, mine, want in zip(some, got, states(stock, some), strict=True):
        kept = one["attention_mask"].bool()
        assert difference(mine[kept], want[kept]) <= LOGITS_TOLERANCE
        assert computed or not mine[~kept].any()
    # Whole rows with and without a mask; packed, rooms of 192 and 128, and one of 64 that comes once.
    assert len(graphs) == 2
    assert all(graph.replays > 1 for graph in graphs)


def test_embeddings_and_tuples(graphs):
    stock = encoder().eval()
    fast = fat5.accelerate(copy.deepcopy(stock), cuda_graphs=True)
    one = batch((96, 96))
    embeddings = stock.shared(one["input_ids"]).detach()
    with torch.no_grad():
        for _ in range(3):
            [got] = fast(inputs_embeds=embeddings, return_dict=False)
    assert difference(got, states(stock, [one])[0]) <= LOGITS_TOLERANCE
    assert len(graphs) == 1


def test_generate_writes_the_same_tokens(graphs):
    stock = t5_v1_1().eval()
    fast = fat5.accelerate(copy.deepcopy(stock), cuda_graphs=True)
    one = {name: value for name, value in rows().items() if name != "labels"}
    want = stock.generate(**one, max_new_tokens=12)
    assert all(torch.equal(fast.generate(**one, max_new_tokens=12), want) for _ in range(3))
    assert len(graphs) == 1


def test_weights_changed_in_place_count_and_moved_ones_are_recorded_anew(graphs):
    fast, some = fat5.accelerate(encoder().eval(), cuda_graphs=True), [batch((96, 96))] * 2
    before = states(fast, some)[1]
    weight = fast.encoder.block[0].layer[0].SelfAttention.q.weight
    with torch.no_grad():
        weight.mul_(3.0)
    changed = states(fast, some)[1]
    assert len(graphs) == 1
    assert not torch.equal(changed, before)
    weight.data = weight.data / 3.0
    assert torch.allclose(states(fast, some)[1], before, atol=1e-5)
    assert len(graphs) == 2


def test_what_a_replay_would_miss_is_run(graphs):
    fast, [one] = fat5.accelerate(encoder(dropout_rate=0.5).eval(), cuda_graphs=True), [batch((96, 96))]
    states(fast, [one] * 2)
    assert len(graphs) == 1

    def replays(call) -> bool:
        before = graphs[-1].replays
        call()
        return graphs[-1].replays > before

    assert replays(lambda: states(fast, [one]))
    assert not replays(lambda: fast(**one).last_hidden_state.sum().backward())
    with torch.no_grad():
        assert not replays(lambda: fast(**one, output_hidden_states=True))
        assert not replays(lambda: fast.train()(**one))
    fast.eval()
    seen = []
    hook = fast.encoder.block[1].register_forward_hook(lambda *_: seen.append(1))
    assert not replays(lambda: states(fast, [one]))
    assert seen == [1]
    hook.remove()
    assert replays(lambda: states(fast, [one]))


def test_adapters_are_run(graphs):
    peft = pytest.importorskip("peft")
    fast = fat5.accelerate(encoder().eval(), cuda_graphs=True)
    adapted = peft.get_peft_model(fast, peft.LoraConfig(target_modules=["q"], init_lora_weights=False)).eval()
    one = batch((96, 96))
    with torch.no_grad():
        on = [adapted(**one).last_hidden_state for _ in range(3)][-1]
        with adapted.disable_adapter():
            off = adapted(**one).last_hidden_state
    assert not torch.equal(on, off)
    assert not graphs


def test_shapes_are_bounded(graphs):
    fast = fat5.accelerate(encoder().eval(), cuda_graphs=True)
    for width in range(5, 5 + MOST + 3):
        states(fast, [batch((width,), width)] * 3)
    assert len(graphs) == MOST


@pytest.mark.parametrize("fault", ["recording", "replay"])
def test_what_fails_falls_back(fault, graphs, monkeypatch, caplog):
    stock = encoder().eval()
    fast = fat5.accelerate(copy.deepcopy(stock), cuda_graphs=True)
    if fault == "recording":

        def fail(*_):
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(recordings, "record", fail)
    else:
        monkeypatch.setattr(Graph, "replay", lambda self: self.out.copy_(2.0 * self.run()))
    some = [batch((96, 96))] * 3
    with caplog.at_level(logging.WARNING, "fat5"):
        got = states(fast, some)
    assert difference(got[2], states(stock, some)[2]) <= LOGITS_TOLERANCE
    assert caplog.text.count("without CUDA graphs") == 1


def test_copies_record_for_themselves_and_undoing_forgets(graphs):
    fast, some = fat5.accelerate(encoder().eval(), cuda_graphs=True), [batch((96, 96))] * 2
    want = states(fast, some)[1]
    for number, other in enumerate((copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)))):
        assert torch.equal(states(other, some)[1], want)
        assert len(graphs) == number + 2
    fat5.accelerate(fast)
    assert fast.encoder.recordings is None
    fat5.accelerate(fast, undo=True)
    assert "recordings" not in vars(fast.encoder)


def test_without_a_gpu_they_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = encoder()
    before = type(model.encoder)
    with pytest.raises(FAT5Error, match=r"^fat5.accelerate: .* PyTorch sees no GPU"):
        fat5.accelerate(model, cuda_graphs=True)
    assert type(model.encoder) is before


def test_rooms():
    assert [room(tokens) for tokens in (1, 64, 65, 1000, 1024, 1025, 8191)] == [64, 64, 128, 1024, 1024, 1152, 8192]
    assert all(tokens <= room(tokens) <= tokens * 1.125 + 64 for tokens in range(1, 5000))


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("computed", [True, False], ids=["padding", "packed"])
@pytest.mark.parametrize("family", ENCODERS.values(), ids=ENCODERS.keys())
def test_graphs_on_a_card(family, computed, how, caplog):
    model = family().eval().cuda()
    if how == "bfloat16":
        model.bfloat16()
    plain = fat5.accelerate(copy.deepcopy(model), compute_padding=computed)
    fast = fat5.accelerate(model, compute_padding=computed, cuda_graphs=True)
    some = [{name: value.cuda() for name, value in batch(lengths).items()} for lengths in BATCHES * 2]
    # A weight that autocast has cast must not outlive its context.
    got, want = [], []
    for one in some:
        for found, encode in ((got, fast), (want, plain)):
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=how == "autocast"):
                found.append(encode(**one).last_hidden_state)
            torch.full((1 << 24,), torch.nan, device="cuda")  # over memory that was given back
    for one, mine, wanted in zip(some, got, want, strict=True):
        kept = one["attention_mask"].bool()
        assert difference(mine[kept].float(), wanted[kept].float()) <= (1e-5 if how == "float32" else 2e-2)
    assert len(fast.encoder.recordings._runs) == (2 if computed else 3)
    assert not caplog.text


@pytest.mark.gpu
@ON_GPU
def test_replays_on_two_streams_do_not_mix():
    fast = fat5.accelerate(encoder().eval().cuda(), cuda_graphs=True)
    some = [{name: value.cuda() for name, value in batch((96, 96)).items()} for _ in range(8)]
    with torch.no_grad():
        want = [fast(**one).last_hidden_state for one in some]
        torch.cuda.synchronize()
        streams, got = [torch.cuda.Stream() for _ in range(2)], []
        for number, one in enumerate(some):
            with torch.cuda.stream(streams[number % 2]):
                got.append(fast(**one).last_hidden_state)
        torch.cuda.synchronize()
    assert all(map(torch.equal, got, want))
