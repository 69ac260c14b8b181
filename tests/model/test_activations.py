"""Policies of gradient checkpointing: gradients stay, and what a policy keeps is not computed again."""

from typing import Any

import pytest
import torch
from test_packed import batch, model

from fat5.model import FAT5ForConditionalGeneration
from fat5.model.activations import checkpoint_activations
from fat5.ops.attention import op

POLICIES = ["selective", "block"]
ATTENTIONS = 2 + 3 * 2
"""Of the model: an encoder's block has one, a decoder's two."""


def gradients(net: Any, data: dict, own: FAT5ForConditionalGeneration) -> list[torch.Tensor]:
    own.zero_grad()
    torch.manual_seed(1)
    net(**data).loss.backward()
    return [parameter.grad.clone() for parameter in own.parameters()]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often attention's forward pass has run, as the only number."""
    count, forward = [0], op.BACKENDS["cpu"].forward

    def counted(*arguments: Any) -> Any:
        count[0] += 1
        return forward(*arguments)

    monkeypatch.setattr(op.BACKENDS["cpu"], "forward", counted)
    return count


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_equal_and_attention_is_kept(policy: str, precision: torch.dtype, calls: list[int]) -> None:
    net, data = model(dropout_rate=0.2, attention_dropout_rate=0.1), batch()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        plain = gradients(net, data, net)
        assert calls == [ATTENTIONS]
        checkpoint_activations(net, policy)
        again = gradients(net, data, net)
    assert all(torch.equal(*pair) for pair in zip(plain, again, strict=True))
    assert calls == [ATTENTIONS * (2 if policy == "selective" else 3)]


@pytest.mark.parametrize(
    ("backend", "policies"),
    [
        pytest.param("aot_eager_decomp_partition", POLICIES[:1], id="selective"),
        pytest.param("aot_eager_decomp_partition", POLICIES[1:], id="block", marks=pytest.mark.slow),
        pytest.param("inductor", POLICIES, id="inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_whole(backend: str, policies: list[str], calls: list[int]) -> None:
    """No graph break, the same loss and gradients, dropout included; attention runs once under `selective`."""
    net = model(dropout_rate=0.2, attention_dropout_rate=0.1, num_layers=1, num_decoder_layers=1)
    data, results = batch(), []
    for policy in ["none", *policies]:
        checkpoint_activations(net, policy)
        torch._dynamo.reset()
        compiled = torch.compile(net, fullgraph=True, backend=backend)
        gradients(compiled, data, net)
        calls[0] = 0
        results.append(gradients(compiled, data, net))
        assert calls == [6 if policy == "block" else 3], policy
        for plain, again in zip(results[0], results[-1], strict=True):
            torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)
