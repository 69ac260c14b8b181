"""Where the Hopper backend serves, its tiles, and where it is faster than Triton's."""

HEAD_DIMS = (64, 128)
MAX_REACH = 255
"""Of a learned bias: its sums take 4 * 2R numbers of float32 for every 32 keys and head."""
SMALLEST_MEAN = 16
"""Of a packed call with a learned bias: a document, an empty one too, takes sums for 128 keys more."""

KEYS = 128
"""Keys in a tile of the backward."""
STRIP = 16
"""Keys in the strip of a tile that one warp owns."""
PADDING = 384
"""End values of the vector repeated on either side of it: no less than the two sides of any tile together."""

HOPPER, MIXED = "hopper", "mixed"
FASTER: dict[tuple[int, bool, bool, bool], str] = {
    (64, True, False, False): HOPPER,
    (64, True, True, False): HOPPER,
    (64, True, False, True): MIXED,
    (64, True, True, True): MIXED,
    (64, False, False, False): HOPPER,
    (64, False, True, False): MIXED,
    (64, False, False, True): MIXED,
    (128, True, False, False): HOPPER,
    (128, True, False, True): HOPPER,
    (128, False, False, False): HOPPER,
    (128, False, False, True): HOPPER,
}
"""(head dimension, relative bias, causal, packed) that "auto" gives to a backend of this folder, as measured on an H200
in bfloat16 (benchmarks/results/h200-hopper.csv, h200-slots.csv): both passes, or with a backward Triton's forward."""
SHORTEST, FEWEST_TOKENS = 1024, 8192
"""What was measured: rows of 1,024 or more; 16,384 tokens."""
TOKENS_A_DOCUMENT = {True: 100, False: 320}
"""Packed, with and without a bias: fewer, empty documents of a fixed shape counted, and Triton's kernels are faster."""

FORWARD_TILES: dict[tuple[int, bool, bool], tuple[int, int]] = {(64, True, False): (128, 128)}
"""Queries and keys in a tile of the forward with a bias, by (head dimension, causal, packed), where not the default."""


def query_block(head_dim: int) -> int:
    """Queries in a tile of the backward with a bias; D 128 has no registers for more."""
    return 128 if head_dim <= 64 else 64
