"""int8 and float8 by the libraries that do it: the recipe of docs/compatibility.md keeps `wo` out of them."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import T5ForConditionalGeneration
from transformers.quantizers.quantizers_utils import should_convert_module

from fat5.generate.decoding import generate
from fat5.model import FAT5ForConditionalGeneration
from stock import difference, fat5_like, rows, t5_v1_1

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
# Eight bits keep two digits of a weight.
INT8_TOLERANCE = 0.1


def recipe() -> str:
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    [snippet] = [text for text in snippets if "TorchAoConfig" in text]
    return snippet


def test_the_recipe_keeps_wo_and_nothing_else_of_a_block():
    """A module is named to some libraries, its weight to others; the bare "wo" would miss the weights."""
    compile(recipe(), "recipe", "exec")
    patterns = re.findall(r'"([^"]+)"', re.search(r"modules_to_not_convert=\[(.*?)\]", recipe())[1])
    layers = {name for name, module in t5_v1_1().named_modules() if isinstance(module, nn.Linear)}
    for suffix in ("", ".weight"):
        left = {name for name in layers if not should_convert_module(name + suffix, patterns)}
        assert left == {name for name in layers if name.endswith(".wo") or name == "lm_head"}
    assert all(should_convert_module(name + ".weight", ["wo"]) for name in layers)


class Reduced(torch.Tensor):
    """A weight of a class of its own, as torchao's, that gives nobody its numbers to be laid out anew."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.cat or "reorder_linear_weight" in str(function):
            raise NotImplementedError(function)
        with torch._C.DisableTorchFunctionSubclass():
            out = function(*args, **(kwargs or {}))
        return out.as_subclass(cls) if function is torch.Tensor.detach else out


def test_the_decoding_loop_calls_weights_of_another_class():
    model, batch = t5_v1_1().eval(), rows()
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    want = model.generate(**given, max_new_tokens=6)
    for module in model.decoder.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.data.as_subclass(Reduced), requires_grad=False)
            assert type(module.weight) is Reduced
    assert torch.equal(generate(model, **given, max_new_tokens=6), want)


@pytest.mark.parametrize("cls", [T5ForConditionalGeneration, FAT5ForConditionalGeneration])
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_recipe_with_torchao(dtype, kind, cls, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="waits for torchao, which FAT5 does not need")
    from transformers import TorchAoConfig

    stock, batch = t5_v1_1(d_model=64, d_kv=16, d_ff=128).eval(), rows()
    stock.save_pretrained(tmp_path)
    how = TorchAoConfig(getattr(quantization, kind)(), modules_to_not_convert=[r".*\.wo", "lm_head"])
    model = cls.from_pretrained(tmp_path, quantization_config=how, dtype=dtype).eval()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    plain = {name for name, module in layers.items() if type(module.weight) is nn.Parameter}
    assert plain == {name for name in layers if name.endswith(".wo") or name == "lm_head"}
    if dtype == torch.float16:
        assert {layers[name].weight.dtype for name in plain if name.endswith(".wo")} == {torch.float32}
    assert difference(model(**batch).logits.float(), stock(**batch).logits) <= INT8_TOLERANCE
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(generate(model, **given, max_new_tokens=4), model.generate(**given, max_new_tokens=4))


def test_dynamic_int8_of_torch():
    """Its layers keep their weight behind a method."""
    stock, batch = t5_v1_1().eval(), rows()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = [
            torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
            for model in (stock, fat5_like(stock))
        ]
    want, got = (model(**batch).logits for model in quantised)
    assert difference(got, want) <= INT8_TOLERANCE
