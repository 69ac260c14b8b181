"""The relative bias as a short vector per head: what attention adds to a score depends only on the distance k - q.

T5's buckets, ALiBi and any clamped learned bias have this form (docs/attention.md), so that attention never needs an
(Lq, Lk) matrix: entry [h, clamp(k - q, -R, R) + R] of a (H, 2R+1) vector.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import _disable_current_modes


def repeat_ends(vector: Tensor, times: int) -> Tensor:
    """(H, n + 2 * times): the end values of (H, n) repeated on either side.

    Not F.pad: its deterministic form on CUDA is imported when it is called, which torch.compile does not trace.
    """
    return torch.cat([vector[:, :1].expand(-1, times), vector, vector[:, -1:].expand(-1, times)], 1)


class RelativeBias:
    """A bias that depends on the head and on the clamped distance between key and query.

    Args:
        vector: (H, 2R+1) floating point, with or without grad; entry [h, clamp(k - q, -R, R) + R].

    Raises:
        TypeError, ValueError: `vector` is no floating-point tensor of two dimensions with an odd last one.
    """

    __slots__ = ("vector",)

    def __init__(self, vector: Tensor) -> None:
        if not isinstance(vector, Tensor) or not vector.is_floating_point():
            raise TypeError("vector: expected a floating-point tensor of shape (heads, 2R+1)")
        if vector.dim() != 2 or vector.shape[1] % 2 == 0:
            raise ValueError(f"vector: expected shape (heads, 2R+1), got {tuple(vector.shape)}")
        self.vector = vector

    @property
    def num_heads(self) -> int:
        return self.vector.shape[0]

    @property
    def max_distance(self) -> int:
        """R: distances beyond it share the value at R (or -R)."""
        return self.vector.shape[1] // 2

    def to(self, device: torch.device | str, **how: Any) -> "RelativeBias":
        """The same bias on another device, as accelerate asks for where a model is spread over several."""
        return RelativeBias(self.vector.to(device, **how))

    @classmethod
    def from_table(cls, weight: Tensor, *, bidirectional: bool, max_distance: int) -> "RelativeBias":
        """The bias of T5's bucket table.

        Args:
            weight: (num_buckets, H), as `relative_attention_bias.weight` of Hugging Face's T5.
            bidirectional: True in encoders, False in decoders (future distances fall into bucket 0).
            max_distance: `relative_attention_max_distance`, 128 in every published T5.

        Source: Raffel et al. 2020, section 2.1; the float32 formula of its released code, to the bit.
        """
        if weight.dim() != 2:
            raise ValueError(f"weight: expected shape (num_buckets, heads), got {tuple(weight.shape)}")
        if weight.shape[0] < (4 if bidirectional else 2):
            raise ValueError(f"weight: expected at least {4 if bidirectional else 2} buckets, got {weight.shape[0]}")
        lookup = _on_device(bucket_lookup(weight.shape[0], bidirectional, max_distance), weight.device)
        chosen = lookup[:, None] == torch.arange(weight.shape[0], device=weight.device)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        # A gather, whose gradient is a plain sum: index_select's adds into 32 rows in no fixed order on a GPU.
        return cls(torch.where(chosen, wide.t()[:, None, :], 0.0).sum(-1))

    @classmethod
    def alibi(
        cls, num_heads: int, max_distance: int, asymmetric: bool = False, device: torch.device | str | None = None
    ) -> "RelativeBias":
        """ALiBi's linear penalty, -slope * |k - q|, exact for lengths up to max_distance + 1.

        `asymmetric` gives each head one slope for keys before the query and another for keys after it, so that a
        bidirectional encoder can tell left from right: of 2H geometric slopes the even ones look left, the odd right.

        Source: Press et al. 2022, section 3 (slopes 2^(-8i/H)).
        """
        slopes = alibi_slopes(2 * num_heads if asymmetric else num_heads)
        left = _on_device(slopes[0::2] if asymmetric else slopes, device)
        right = _on_device(slopes[1::2] if asymmetric else slopes, device)
        distance = torch.arange(-max_distance, max_distance + 1, dtype=torch.float32, device=device)
        penalty = torch.where(distance < 0, left[:, None] * distance, -right[:, None] * distance)
        return cls(penalty)

    def dense(self, query_length: int, key_length: int, query_offset: int | Tensor = 0) -> Tensor:
        """The same bias as a (1, H, Lq, Lk) tensor; `query_offset` is the position of the first query."""
        device, reach = self.vector.device, self.max_distance
        queries = torch.arange(query_length, device=device)[:, None] + query_offset
        distance = torch.arange(key_length, device=device)[None, :] - queries
        index = distance.clamp(-reach, reach) + reach
        return self.vector[:, index][None]


def _on_device(numbers: list[Any], device: torch.device | str | None) -> Tensor:
    """Integers as int64, others as float32. On a GPU made once: a CUDA graph cannot hold a copy from the host."""
    dtype = torch.int64 if isinstance(numbers[0], int) else torch.float32
    if device is None or torch.device(device).type != "cuda" or torch.compiler.is_compiling() or detect_fake_mode():
        return torch.tensor(numbers, dtype=dtype, device=device)
    return _kept(tuple(numbers), dtype, torch.device(device))


@lru_cache(maxsize=32)
def _kept(numbers: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a generation may be the first to ask, and training the next
        return torch.tensor(numbers, dtype=dtype, device=device)


def alibi_slopes(num_heads: int) -> list[float]:
    """2^(-8i/n) for i = 1..n where n is a power of two; otherwise the next power's slopes fill the rest, as in the
    paper's code.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    if power < num_heads:
        finer = [2.0 ** (-8.0 * i / (2 * power)) for i in range(1, 2 * power + 1, 2)]
        slopes += finer[: num_heads - power]
    return slopes


@torch.compiler.assume_constant_result
def bucket_lookup(num_buckets: int, bidirectional: bool, max_distance: int) -> list[int]:
    """The bucket of each distance -R..R, R being the first distance from which the bucket no longer changes."""
    return _bucket_lookup(num_buckets, bidirectional, max_distance)


@lru_cache(maxsize=32)
def _bucket_lookup(num_buckets: int, bidirectional: bool, max_distance: int) -> list[int]:
    # Always on the CPU and in float32: a logarithm that rounds differently moves the edge of a bucket. The modes are
    # disabled so that torch.export records the numbers and not how they were made.
    with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
        distance = torch.arange(-max_distance - 1, max_distance + 2)
        side_buckets = num_buckets // 2 if bidirectional else num_buckets
        behind = distance.abs() if bidirectional else (-distance).clamp(min=0)
        exact = side_buckets // 2
        ratio = torch.log(behind.clamp(min=1).float() / exact) / math.log(max_distance / exact)
        coarse = (exact + (ratio * (side_buckets - exact)).to(torch.long)).clamp(max=side_buckets - 1)
        bucket = torch.where(behind < exact, behind, coarse)
        if bidirectional:
            bucket = bucket + (distance > 0) * side_buckets
        buckets: list[int] = bucket.tolist()
    middle = len(buckets) // 2
    reach = middle
    while reach > 1 and buckets[middle - reach + 1] == buckets[0] and buckets[middle + reach - 1] == buckets[-1]:
        reach -= 1
    return buckets[middle - reach : middle + reach + 1]
