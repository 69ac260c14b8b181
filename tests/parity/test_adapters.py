"""Whatever stands in the place of a layer counts: adapters of PEFT, hooks, parametrizations; beside the stock class."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fat5
from fat5.generate.decoding import Decoder, generate
from pairwise import pairwise
from stock import (
    GRADIENT_TOLERANCE,
    LOGITS_TOLERANCE,
    SIZES,
    difference,
    fat5_like,
    packed,
    rows,
    t5_v1_0,
    t5_v1_1,
    umt5,
)

peft = pytest.importorskip("peft")

# Adapters are small and random here, and some of their gradients are tiny differences of large terms.
ADAPTER_TOLERANCE = 20 * GRADIENT_TOLERANCE
LAYERS = ["embed_tokens", "relative_attention_bias", "q", "k", "v", "o", "wo", "lm_head"]
LAYERS_OF = {t5_v1_0: [*LAYERS, "wi"], t5_v1_1: [*LAYERS, "wi_0", "wi_1"], umt5: [*LAYERS, "wi_0", "wi_1"]}
# Every layer of one family, and of the others where they differ: tied tables, one matrix more, a bias in every block.
QUICK = {
    t5_v1_0: ["embed_tokens", "lm_head", "wi"],
    t5_v1_1: LAYERS_OF[t5_v1_1],
    umt5: ["relative_attention_bias", "q"],
}
MATRICES = ["q", "v", "wo"]
METHODS = {
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=MATRICES),
    "LoRA with a bias": lambda: peft.LoraConfig(r=4, lora_bias=True, target_modules=MATRICES),
    "IA3": lambda: peft.IA3Config(target_modules=["k", "v", "wo", "lm_head"], feedforward_modules=["wo", "lm_head"]),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=MATRICES),
    "norms": lambda: peft.LNTuningConfig(target_modules=["layer_norm", "final_layer_norm"]),
    "whole modules": lambda: peft.LoraConfig(
        r=4, target_modules=["q"], modules_to_save=["relative_attention_bias", "layer_norm", "lm_head"]
    ),
    "rows of the table": lambda: peft.LoraConfig(
        r=4, target_modules=["q"], trainable_token_indices={"embed_tokens": list(range(30))}
    ),
}
OF_PROMPTS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type=peft.TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=5),
    "prefix": lambda: peft.PrefixTuningConfig(task_type=peft.TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=5),
}


def adapted(model, config, like=None):
    """`model` with adapters whose weights are random, or those of `like`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights
        wrapped = peft.get_peft_model(model, config())
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            given = None if like is None else like.get_parameter(name)
            parameter.data.copy_(parameter + 0.3 * torch.randn_like(parameter) if given is None else given)
    return wrapped


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(stock, config, layouts=("rows", "packed", "accelerated", "fused")):
    """Loss and every gradient in each layout against those of the stock model; returns both models, adapted."""
    batch, ours = rows(), fat5_like(stock)
    fast = {
        name: fat5.accelerate(copy.deepcopy(stock), fused_loss=name == "fused") for name in ("accelerated", "fused")
    }
    plain = stock(**batch).loss
    want = adapted(stock, config)
    models = {name: adapted(model, config, want) for name, model in fast.items()}
    models["rows"] = models["packed"] = adapted(ours, config, want)
    loss = want(**batch).loss
    assert difference(loss[None], plain[None]) > 10 * LOGITS_TOLERANCE
    expected = gradients(want, loss)
    for layout in layouts:
        got = models[layout](**(packed(batch) if layout == "packed" else batch)).loss
        assert difference(got[None], loss[None]) <= LOGITS_TOLERANCE, layout
        found = gradients(models[layout], got)
        assert found.keys() == expected.keys(), layout
        for name, gradient in expected.items():
            assert difference(found[name], gradient) <= ADAPTER_TOLERANCE, (layout, name)
    return want.eval(), models["rows"].eval()


def prompts():
    batch = rows()
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        pytest.param(family, layer, marks=() if layer in quick else pytest.mark.slow)
        for family, quick in QUICK.items()
        for layer in LAYERS_OF[family]
    ],
)
def test_lora_on_each_layer(family, layer):
    """Trained, decoded and merged: everywhere as in the stock class."""
    want, mine = compare(family(), lambda: peft.LoraConfig(r=4, init_lora_weights=False, target_modules=[layer]))
    batch = prompts()
    written = want.generate(**batch, max_new_tokens=8)
    for model in (want, mine):
        assert torch.equal(generate(model.base_model.model, **batch, max_new_tokens=8), written)
    if layer != "embed_tokens" and not (layer == "lm_head" and family is t5_v1_0):
        # Tied weights, merged, change where they are not adapted as well; PEFT warns.
        given = batch | {"decoder_input_ids": written}
        before, merged = mine(**given).logits, mine.merge_and_unload()
        assert difference(merged(**given).logits, before) <= ADAPTER_TOLERANCE
        assert torch.equal(generate(merged, **batch, max_new_tokens=8), written)


@pytest.mark.parametrize("method", METHODS)
def test_other_adapters(method):
    want, mine = compare(t5_v1_1(), METHODS[method])
    batch = prompts()
    written = want.generate(**batch, max_new_tokens=8)
    for model in (want, mine):
        assert torch.equal(generate(model.base_model.model, **batch, max_new_tokens=8), written)


@pytest.mark.parametrize("method", OF_PROMPTS)
def test_learned_prompts(method):
    """Of rows; packed documents have no place for them, and the decoding loop takes no model around a model."""
    _, mine = compare(t5_v1_1(), OF_PROMPTS[method], ("rows", "accelerated", "fused"))
    with pytest.raises(TypeError, match=r"^model: expected a FAT5 or T5 model"):
        generate(mine, **prompts(), max_new_tokens=8)


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["shared"]}, {"modules_to_save": ["shared"]}, {"trainable_token_indices": [3, 4]}],
    ids=lambda options: next(iter(options)),
)
def test_adapters_of_the_shared_table_are_refused(options):
    """No stack reads it: in the stock class they are silently without effect."""
    config = peft.LoraConfig(r=4, init_lora_weights=False, **({"target_modules": ["q"]} | options))
    mine = adapted(fat5_like(t5_v1_1()), lambda: config).eval()
    for call in (
        lambda: mine(**rows()),
        lambda: mine(**packed(rows())),
        lambda: mine.generate(**prompts(), max_new_tokens=2),
        lambda: generate(mine.base_model.model, **prompts(), max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match=r"^shared: the \w+ in its place has no effect"):
            call()


@pytest.mark.parametrize("layout", ["rows", "packed", "accelerated"])
def test_inputs_that_require_gradients(layout):
    """What reentrant checkpoints of a frozen model need."""
    stock, batch = t5_v1_1(), rows()
    ours = fat5.accelerate(copy.deepcopy(stock)) if layout == "accelerated" else fat5_like(stock)
    models = []
    for model in (stock, ours):
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        models.append(adapted(model, lambda: peft.LoraConfig(r=4, target_modules=["q", "v"]), *models))
    want = gradients(models[0], models[0](**batch).loss)
    got = gradients(models[1], models[1](**(packed(batch) if layout == "packed" else batch)).loss)
    assert got.keys() == want.keys()
    assert all(difference(got[name], want[name]) <= ADAPTER_TOLERANCE for name in want)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def hook(module):
    module.register_forward_hook(lambda _, __, output: output / 2)


def parametrization(module):
    parametrize.register_parametrization(module, "weight", Halved())


@pairwise(
    2,
    layer=["relative_attention_bias", "lm_head", "layer_norm", "embed_tokens", "q", "v", "wi_0", "wi_1", "wo"],
    change={"hook": hook, "parametrization": parametrization},
    layout=["rows", "packed", "accelerated", "fused"],
)
def test_hooks_and_parametrizations(layer, change, layout):
    """Half of what each such layer gives, by a hook or in its weight."""
    stock, batch = t5_v1_1(), rows()
    fast = {"accelerated": False, "fused": True}
    ours = fat5.accelerate(copy.deepcopy(stock), fused_loss=fast[layout]) if layout in fast else fat5_like(stock)
    plain = stock(**batch).loss
    for model in (stock, ours):
        for module in [x for name, x in model.named_modules() if name.split(".")[-1] == layer]:
            change(module)
    want, got = stock(**batch).loss, ours(**(packed(batch) if layout == "packed" else batch)).loss
    assert difference(want[None], plain[None]) > 10 * LOGITS_TOLERANCE
    assert difference(got[None], want[None]) <= LOGITS_TOLERANCE
    if layout != "fused":
        batch = prompts()
        written = stock.eval().generate(**batch, max_new_tokens=8)
        assert torch.equal(generate(ours.eval(), **batch, max_new_tokens=8), written)


def test_a_hook_on_every_module():
    stock, batch = t5_v1_1(), rows()
    ours, seen = fat5_like(stock), []
    want = ours(**batch).loss

    def halve(module, _, output):
        if isinstance(module, nn.Linear | nn.Embedding):
            seen.append(module)
            return output / 2

    handle = nn.modules.module.register_module_forward_hook(halve)
    try:
        losses = [stock(**batch).loss, ours(**batch).loss, ours(**packed(batch)).loss]
    finally:
        handle.remove()
    assert difference(losses[0][None], want[None]) > 10 * LOGITS_TOLERANCE
    for loss in losses[1:]:
        assert difference(loss[None], losses[0][None]) <= LOGITS_TOLERANCE


@pytest.mark.parametrize(
    "place", ["decoder", "decoder.block.1", "decoder.block.1.layer.0", "decoder.block.1.layer.1.EncDecAttention"]
)
def test_hooks_that_the_decoding_loop_would_not_call_are_refused(place):
    ours = fat5_like(t5_v1_1()).eval()
    ours.get_submodule(place).register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=rf"would not call the hook of {place};"):
        Decoder(ours)


def test_the_decoding_loop_after_hidden_states():
    """For which transformers leaves hooks behind."""
    stock, batch = t5_v1_1().eval(), rows()
    stock(**batch, output_hidden_states=True)
    assert stock.decoder.block[0]._forward_hooks
    written = stock.generate(**prompts(), max_new_tokens=1)
    assert written.shape == Decoder(stock).generate(**prompts(), max_new_tokens=1).shape


@pytest.mark.parametrize("change", [hook, parametrization])
@pytest.mark.parametrize("layer", ["hidden", "output"])
def test_the_network_of_fire(layer, change):
    config = fat5.FAT5Config(**SIZES, position_encoding="fire")
    ours, batch = fat5.FAT5ForConditionalGeneration(config), rows()
    plain = ours(**batch).loss
    for stack in (ours.encoder, ours.decoder):
        change(stack.fire.get_submodule(layer))
    assert difference(ours(**batch).loss[None], plain[None]) > 10 * LOGITS_TOLERANCE
