"""Where the Hopper backend serves, its tiles, and where it is faster than Triton's."""

HEAD_DIMS = (64, 128)
MAX_REACH = 255
"""Of a learned bias: its sums take 4 * 2R numbers of float32 for every 32 keys and head."""

KEYS = 128
"""Keys in a tile of the backward."""
STRIP = 16
"""Keys in the strip of a tile that one warp owns."""
PADDING = 384
"""End values of the vector repeated on either side of it: no less than the two sides of any tile together."""

FASTER: frozenset[tuple[int, bool, bool, bool]] = frozenset()
"""(head dimension, relative bias, causal, packed) in which "auto" takes this backend: measured."""


def query_block(head_dim: int) -> int:
    """Queries in a tile of the backward that learns; D 128 has no registers for more."""
    return 128 if head_dim <= 64 else 64
