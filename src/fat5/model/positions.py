"""Position encodings: what each adds to embeddings, to queries and keys, or to attention scores.

| encoding | where | parameters |
|---|---|---|
| t5 | a bias of the scores, learned by bucket of distance (Raffel et al. 2020) | a table in the first block |
| alibi | a bias of the scores, linear in distance (Press et al. 2022) | none |
| fire | a bias of the scores, a small network of normalised log distance (Li et al. 2024) | the network |
| rope | a rotation of queries and keys (Su et al. 2021) | none |
| absolute | added to the embeddings, learned or sinusoidal (Vaswani et al. 2017) | the table, if learned |
| none | nothing; a decoder still learns order from its causal mask | none |
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fat5 import ops
from fat5.errors import DataError
from fat5.model.configuration import FAT5Config
from fat5.model.layers import Embedding


class Fire(nn.Module):
    """FIRE: bias = MLP(psi(distance) / psi(max(position, L))), psi(x) = log(c x + 1), with learned c and L.

    A bidirectional stack gives the network the sign of the distance, so that left and right can differ; the position is
    the larger of query's and key's, which in a causal stack is the query's, as in the paper (equation 4).
    """

    def __init__(self, config: FAT5Config) -> None:
        super().__init__()
        self.hidden = nn.Linear(1, config.fire_width)
        self.output = nn.Linear(config.fire_width, config.num_heads)
        self.slope = nn.Parameter(torch.empty(()))
        self.threshold = nn.Parameter(torch.empty(()))

    def forward(self, query_length: int, key_length: int, query_offset: int | Tensor = 0) -> Tensor:
        """(1, H, Lq, Lk), float32."""
        device = self.slope.device
        queries = (torch.arange(query_length, device=device) + query_offset)[:, None].float()
        keys = torch.arange(key_length, device=device)[None, :].float()
        distance = keys - queries
        with torch.autocast(device.type, enabled=False):
            slope, threshold = self.slope.float().abs(), self.threshold.float().abs()
            scale = torch.log1p(slope * torch.maximum(torch.maximum(queries, keys), threshold))
            share = distance.sign() * torch.log1p(slope * distance.abs()) / scale
            bias = _in_float32(self.output, F.relu(_in_float32(self.hidden, share[..., None])))
        return bias.permute(2, 0, 1)[None]


def _in_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x), float32 whatever the layer's dtype; an adapted layer computes in its own."""
    if ops.is_plain(layer, nn.Linear):
        return F.linear(x, layer.weight.float(), layer.bias.float())
    return layer(x.to(layer.weight.dtype)).float()


class AbsolutePositions(nn.Module):
    """Adds a vector for each position to the embeddings: a learned table, or sinusoids."""

    def __init__(self, config: FAT5Config) -> None:
        super().__init__()
        self.learned = config.absolute_kind == "learned"
        self.width = config.d_model
        if self.learned:
            self.embedding = Embedding(config.max_positions, config.d_model)

    def check(self, length: int) -> None:
        """Raises DataError when the learned table is too short."""
        if self.learned and length > self.embedding.num_embeddings:
            raise DataError(
                f"a document of {length} tokens is longer than the {self.embedding.num_embeddings} learned positions",
                hint="raise max_positions, or cut documents shorter",
            )

    def forward(self, positions: Tensor) -> Tensor:
        """positions (...) int64 to (..., d_model) float32."""
        if self.learned:
            # Rows behind the last document may count beyond the table; nobody reads them.
            return self.embedding(positions.clamp(max=self.embedding.num_embeddings - 1))
        angles = _angles(positions, self.width, 10_000.0)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., : self.width]


class Rotary(nn.Module):
    """Rotates pairs (i, i + n/2) of the first n = rotary_fraction * d_kv dimensions of each head by position *
    frequency.
    """

    def __init__(self, config: FAT5Config) -> None:
        super().__init__()
        self.width = int(config.d_kv * config.rotary_fraction)
        self.base, self.scaling = float(config.rotary_base), float(config.rotary_scaling)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each (..., n/2) float32."""
        angles = _angles(positions.float() / self.scaling, self.width, self.base)
        return angles.cos(), angles.sin()


def _angles(positions: Tensor, width: int, base: float) -> Tensor:
    half = (width + 1) // 2
    frequency = base ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    return positions[..., None].float() * frequency
