"""The packed model: documents do not see each other, every position encoding, dropout, checkpointing, autocast,
compile.
"""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fat5.errors import ConfigurationError, DataError
from fat5.model import POSITION_ENCODINGS, PRESETS, FAT5Config, FAT5ForConditionalGeneration

TINY = dict(
    vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4, dropout_rate=0.0,
    feed_forward_proj="gated-gelu", tie_word_embeddings=False,
)  # fmt: skip
VARIANTS = {name: {"position_encoding": name} for name in POSITION_ENCODINGS} | {
    "alibi-asymmetric": {"position_encoding": "alibi", "alibi_asymmetric": True},
    "rope-half": {"position_encoding": "rope", "rotary_fraction": 0.5, "rotary_scaling": 2.0},
    "sinusoidal": {"position_encoding": "absolute", "absolute_kind": "sinusoidal"},
}
EVERY_ENCODING = pytest.mark.parametrize("variant", VARIANTS)


def model(**options) -> FAT5ForConditionalGeneration:
    return FAT5ForConditionalGeneration(FAT5Config(**(TINY | options))).train()


def batch(sources=(20, 7, 33), targets=(6, 9, 4)) -> dict:
    def starts(lengths):
        return torch.tensor([0, *lengths]).cumsum(0).int()

    return {
        "input_ids": torch.randint(2, 64, (sum(sources),)), "cu_seqlens": starts(sources), "max_seqlen": 40,
        "labels": torch.randint(2, 64, (sum(targets),)), "decoder_cu_seqlens": starts(targets), "decoder_max_seqlen":
        16,
    }  # fmt: skip


@EVERY_ENCODING
def test_a_document_changes_nothing_in_others(variant):
    net, first = model(**VARIANTS[variant]).eval(), batch()
    second = first | {"input_ids": first["input_ids"].clone(), "labels": first["labels"].clone()}
    second["input_ids"][20:27] = torch.randint(2, 64, (7,))
    second["labels"][6:15] = torch.randint(2, 64, (9,))
    losses = [net(**which, per_token=True).token_loss for which in (first, second)]
    assert torch.equal(losses[0][:6], losses[1][:6])
    assert torch.equal(losses[0][15:], losses[1][15:])
    assert not torch.equal(losses[0][6:15], losses[1][6:15])


@EVERY_ENCODING
def test_packed_is_padded_is_cached(variant):
    """One document: packed losses, padded logits, and logits made token by token with a cache agree."""
    net, one = model(**VARIANTS[variant]).eval(), batch((30,), (12,))
    ids, labels = one["input_ids"][None], one["labels"][None]
    padded = net(input_ids=ids, labels=labels)
    torch.testing.assert_close(net(**one).loss, padded.loss)
    inputs = net.prepare_decoder_input_ids_from_labels(labels)
    memory, cache, steps = net.encoder(ids), None, []
    for token in inputs.split([3, *[1] * 9], dim=1):
        out = net(encoder_outputs=memory, decoder_input_ids=token, past_key_values=cache, use_cache=True)
        cache, steps = out.past_key_values, [*steps, out.logits]
    torch.testing.assert_close(torch.cat(steps, dim=1), padded.logits, rtol=1e-4, atol=1e-4)


@EVERY_ENCODING
def test_every_parameter_learns(variant):
    net = model(**VARIANTS[variant])
    net(**batch()).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


@EVERY_ENCODING
def test_position_encodings_tell_order(variant):
    """Reversing the source changes the loss, except where nothing encodes positions in the encoder."""
    net, one = model(**VARIANTS[variant]).eval(), batch((30,), (12,))
    turned = one | {"input_ids": one["input_ids"].flip(0)}
    same = torch.allclose(net(**one).loss, net(**turned).loss, rtol=1e-6)
    assert same == (variant in ("none", "alibi"))  # a symmetric bias sees the mirror image alike


def test_checkpointing_changes_no_gradient():
    net, data = model(dropout_rate=0.2), batch()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            net.gradient_checkpointing_enable()
        net.zero_grad()
        torch.manual_seed(1)
        net(**data).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients))


def test_dropout_only_in_training():
    net, data = model(dropout_rate=0.3), batch()
    assert net(**data).loss != net(**data).loss
    net.eval()
    assert net(**data).loss == net(**data).loss


def test_attention_dropout_alone():
    net, data = model(attention_dropout_rate=0.3), batch()
    assert net(**data).loss != net(**data).loss


def test_bf16_autocast():
    net, data = model(), batch()
    want = net(**data).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(**data).loss
    loss.backward()
    torch.testing.assert_close(loss, want, rtol=2e-2, atol=0)
    assert all(
        parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() for parameter in net.parameters()
    )


def test_z_loss_and_smoothing_reach_both_forwards():
    one = batch((30,), (12,))
    plain, torch_seed = model().eval(), model(z_loss=0.1, label_smoothing=0.1).eval()
    torch_seed.load_state_dict(plain.state_dict())
    padded = {"input_ids": one["input_ids"][None], "labels": one["labels"][None]}
    torch.testing.assert_close(torch_seed(**one).loss, torch_seed(**padded).loss)
    assert torch_seed(**one).loss > plain(**one).loss


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_and_once(backend):
    """No graph break, and one compilation for every batch of equal budget."""
    net = model(num_layers=1, num_decoder_layers=1)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for sources, targets in (((20, 7, 33), (6, 9, 4)), ((30, 10, 20), (2, 2, 15)), ((0, 25, 35), (0, 9, 10))):
        data = batch(sources, targets)
        loss = compiled(**data).loss
        loss.backward()
        torch.testing.assert_close(loss, net(**data).loss)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("name", "parameters"), [("fat5-small", 146_832_896), ("fat5-base", 305_184_000), ("fat5-large", 973_204_480)]
)
def test_presets_have_exactly_these_parameters(name, parameters):
    with torch.device("meta"):
        net = FAT5ForConditionalGeneration(FAT5Config.preset(name))
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters


def test_initialisation_is_t5_s():
    config = FAT5Config.preset("fat5-demo")
    net = FAT5ForConditionalGeneration(config)
    layer = net.decoder.block[1].layer
    deviations = {
        net.shared: 1.0, net.lm_head: config.d_model**-0.5,
        layer[0].SelfAttention.q: (config.d_model * config.d_kv) ** -0.5,
        layer[1].EncDecAttention.k: config.d_model**-0.5,
        layer[0].SelfAttention.o: (config.num_heads * config.d_kv) ** -0.5,
        layer[2].DenseReluDense.wi_0: config.d_model**-0.5, layer[2].DenseReluDense.wo: config.d_ff**-0.5,
    }  # fmt: skip
    for module, deviation in deviations.items():
        assert abs(module.weight.std() / deviation - 1) < 0.02
    assert (layer[0].layer_norm.weight == 1).all()
    first = net(**batch()).loss
    assert abs(first - math.log(config.vocab_size)) < 1.0  # near a guess


def test_generates_with_a_decoder_deeper_than_the_encoder():
    net, ids = model(decoder_start_token_id=0).eval(), torch.randint(2, 64, (2, 9))
    written = net.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6)
    logits = net(input_ids=ids, decoder_input_ids=written, use_cache=False).logits
    logits[..., 1] = float("-inf")  # min_new_tokens forbids the end
    assert torch.equal(logits[:, :-1].argmax(-1), written[:, 1:])


def test_learned_positions_run_out_with_a_message():
    net = model(position_encoding="absolute", max_positions=8)
    with pytest.raises(DataError, match="max_positions"):
        net(**batch())


def test_packed_training_names_what_it_lacks():
    with pytest.raises(ValueError, match=r"^decoder_max_seqlen"):
        model()(**(batch() | {"decoder_max_seqlen": None}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"position_encoding": "polar"}, {"num_heads": 0}, {"dropout_rate": 1.0}, {"z_loss": -1.0},
        {"relative_attention_num_buckets": 7}, {"absolute_kind": "random"},
    ],
)  # fmt: skip
def test_bad_configuration_names_the_key(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        FAT5Config(**(TINY | wrong))


def test_unknown_preset_lists_the_known():
    with pytest.raises(ConfigurationError, match=next(iter(PRESETS))):
        FAT5Config.preset("fat5-huge")
