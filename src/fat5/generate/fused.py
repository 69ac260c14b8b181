"""A decoding step on a GPU in eight kernels a layer (ops/triton/few_rows.py), and greedy decoding in one more.

It serves decoders whose layers are plain: no adapter, hook or quantised weight, one dtype, GELU or ReLU, T5's bias,
ALiBi's, absolute positions or none. The step of step.py serves the others, and is what this one is compared with.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fat5.ops import is_hooked
from fat5.ops.choice import uses_triton

MOST_ROWS = 128
"""With more rows a step is a matter of arithmetic, which PyTorch's products do better."""
ACTIVATIONS = {"gelu_new": "gelu", "relu": "relu"}
ENCODINGS = ("t5", "alibi", "absolute", "none")


def are_wanted(weight: Tensor) -> bool:
    """Whether the kernels serve a decoder with such weights, if it is plain."""
    return weight.dtype != torch.float64 and uses_triton("decoding", weight)


class FusedDecoder:
    """The weights of a `DecoderWeights` as the kernels take them."""

    def __init__(self, weights: Any, activation: str) -> None:
        self.decoder, self.scale = weights.decoder, 1.0 if weights.scale is None else weights.scale
        self.activation = ACTIVATIONS[activation]
        self.layers = [(_norms(layer.norms), layer) for layer in weights.layers]
        [self.last_norm] = _norms([weights.decoder.final_layer_norm])
        self.head = weights.lm_head.joined
        self.is_absolute = weights.encoding == "absolute"

    @classmethod
    def of(cls, weights: Any, activation: str, norms: tuple[type, ...]) -> "FusedDecoder | None":
        """None unless the kernels serve each part of the decoder; `norms` are the classes of RMSNorm that they know."""
        projections = [weights.lm_head]
        for layer in weights.layers:
            projections += [layer.query_key_value, layer.output, layer.memory_query, layer.memory_output]
            projections += [layer.inner, layer.outer, *([] if layer.gate is None else [layer.gate])]
        joined = [projection.joined for projection in projections]
        if any(weight is None or not weight.is_contiguous() for weight in joined):
            return None
        if len({(weight.dtype, weight.device) for weight in joined}) > 1 or not are_wanted(joined[0]):
            return None
        every_norm: list[Any] = [norm for layer in weights.layers for norm in layer.norms] + [
            weights.decoder.final_layer_norm
        ]
        if not all(not is_hooked(norm) and isinstance(norm, norms) for norm in every_norm):
            return None
        if activation not in ACTIVATIONS or weights.encoding not in ENCODINGS:
            return None
        return cls(weights, activation)

    def hidden(self, step: Any, tokens: Tensor, position: Tensor) -> Tensor:
        """The states (rows, d) before the last norm; keys and values of `tokens` are kept."""
        from fat5.ops.triton.few_rows import attend_memory, attend_own, project

        hidden = self.decoder.embed_tokens(tokens)
        if self.is_absolute:
            hidden = hidden + self.decoder.absolute(position).to(hidden.dtype)
        bias: Any = None
        for i, ((own, across, dense), layer) in enumerate(self.layers):
            bias = bias if step.biases[i] is None else step.biases[i]
            joined = project(hidden, layer.query_key_value.joined, **own)
            mixed = attend_own(joined, step.keys[i], step.values[i], bias, position, step.ancestors)
            hidden = project(mixed, layer.output.joined, residual=hidden)
            query = project(hidden, layer.memory_query.joined, **across)
            mixed = attend_memory(
                query, step.memory[2 * i], step.memory[2 * i + 1], step.memory_hidden, step.memory_ends
            )
            hidden = project(mixed, layer.memory_output.joined, residual=hidden)
            gate = None if layer.gate is None else layer.gate.joined
            inner = project(hidden, layer.inner.joined, activation=self.activation, second=gate, **dense)
            hidden = project(inner, layer.outer.joined, residual=hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, V) float32."""
        from fat5.ops.triton.few_rows import project

        return project(hidden, self.head, scale=self.scale, dtype=torch.float32, **self.last_norm)


class Greedy:
    """Greedy decoding of one batch after another, on the device alone.

    Args:
        step: a step with a `FusedDecoder`, and one row an item.
        stops: how many tokens end a row. pad: what follows an end.

    Attributes:
        written: (rows, 1 + capacity) int64. ended: (rows,) int32. lengths: (rows,) int64, tokens behind the first.
    """

    def __init__(self, step: Any, stops: int, pad: int) -> None:
        self.step, self.pad, device = step, pad, step.keys.device
        self.written = torch.full((step.items, 1 + step.capacity), pad, device=device)
        self.tokens, self.lengths = (torch.zeros(step.items, dtype=torch.long, device=device) for _ in range(2))
        self.ended = torch.zeros(step.items, dtype=torch.int32, device=device)
        self.stop = torch.zeros(stops, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)

    def start(self, first: Tensor, stop: Tensor) -> None:
        """Begins behind `first` (b,), b <= rows; the rows beyond write padding."""
        rows = len(first)
        self.written.fill_(self.pad)
        self.written[:rows, 0] = first
        self.tokens.zero_()
        self.tokens[:rows] = first
        self.ended.fill_(1)
        self.ended[:rows] = 0
        for kept in (self.lengths, self.position):
            kept.zero_()
        self.stop.copy_(stop)

    def advance(self) -> Tensor:
        """Writes one token a row; returns the largest logits of each block of the vocabulary."""
        from fat5.ops.triton.few_rows import choose, largest_outputs

        fused = self.step.fused
        hidden = fused.hidden(self.step, self.tokens, self.position)
        best, index = largest_outputs(hidden, fused.head, scale=fused.scale, **fused.last_norm)
        places = self.tokens, self.written, self.ended, self.lengths, self.stop, self.position
        choose(best, index, *places, self.pad)
        self.position += 1
        return best


def _norms(norms: list[nn.Module]) -> list[dict[str, Any]]:
    """The arguments of `project` that normalise as each of these does."""
    return [{"norm": norm.weight, "eps": norm.eps if hasattr(norm, "eps") else norm.variance_epsilon} for norm in norms]
