"""(block_m, block_n, num_warps, num_stages) of every kernel, as shipped."""

Row = tuple[int, int, int, int]

# (kernel, head dimension up to, bytes an element): what fits and does not spill on every architecture from sm_80 on,
# but sm_90 where that has a row below.
DEFAULTS: dict[tuple[str, int, int], Row] = {
    ("forward", 64, 2): (128, 64, 8, 2),
    ("query_gradient", 64, 2): (64, 32, 4, 2),
    ("key_gradient", 64, 2): (32, 128, 8, 2),
    ("band", 64, 2): (64, 32, 8, 2),
    ("dense_gradient", 64, 2): (64, 32, 8, 1),
    ("forward", 128, 2): (128, 32, 8, 2),
    ("query_gradient", 128, 2): (64, 64, 8, 1),
    ("key_gradient", 128, 2): (64, 64, 8, 1),
    ("band", 128, 2): (64, 16, 8, 1),
    ("dense_gradient", 128, 2): (64, 32, 8, 2),
    ("forward", 64, 4): (32, 32, 4, 1),
    ("query_gradient", 64, 4): (16, 32, 4, 1),
    ("key_gradient", 64, 4): (16, 32, 4, 1),
    ("band", 64, 4): (16, 16, 4, 1),
    ("dense_gradient", 64, 4): (16, 16, 4, 1),
    ("forward", 128, 4): (16, 16, 4, 1),
    ("query_gradient", 128, 4): (16, 16, 4, 1),
    ("key_gradient", 128, 4): (16, 16, 4, 1),
    ("band", 128, 4): (16, 16, 8, 1),
    ("dense_gradient", 128, 4): (16, 16, 4, 1),
}

# (kernel, architecture or 0 for all, head dimension up to, bytes an element): with dropout, whose mask is made in
# registers (the band also with a key mask), where the row without it spills. Compiled for, not timed.
DROPOUT: dict[tuple[str, int, int, int], Row] = {
    ("forward", 0, 64, 2): (128, 32, 8, 2),
    ("query_gradient", 90, 64, 2): (64, 32, 4, 2),
    ("band", 90, 64, 2): (64, 32, 4, 2),
    ("forward", 90, 128, 2): (128, 32, 8, 2),
    ("query_gradient", 90, 128, 2): (64, 32, 4, 2),
    ("key_gradient", 90, 128, 2): (16, 128, 8, 1),
    ("dense_gradient", 0, 128, 2): (64, 16, 8, 1),
    ("key_gradient", 0, 128, 4): (16, 16, 8, 1),
    ("query_gradient", 0, 128, 4): (16, 16, 8, 1),
}

# The same beside a dense bias, whose pointers take registers: where the row without one spills. Those for all
# architectures (0) come after TUNED.
DENSE: dict[tuple[str, int, int, int], Row] = {
    ("query_gradient", 0, 64, 2): (64, 16, 4, 2),
    ("key_gradient", 0, 64, 2): (16, 128, 8, 2),
    ("query_gradient", 0, 128, 2): (64, 32, 8, 1),
    ("forward", 86, 128, 2): (64, 32, 4, 2),
    ("forward", 89, 128, 2): (64, 32, 4, 2),
    ("key_gradient", 100, 64, 4): (16, 32, 8, 1),
    ("query_gradient", 90, 128, 2): (128, 32, 8, 3),
}

# (kernel, architecture, head dimension up to, bytes an element): measured, 16,384 tokens, relative bias; the dense
# gradient's, compiled for and not timed, is the tile that does not spill there.
TUNED: dict[tuple[str, int, int, int], Row] = {
    ("band", 90, 64, 2): (64, 64, 4, 2),
    ("band", 90, 128, 2): (64, 64, 4, 2),
    ("dense_gradient", 90, 128, 2): (64, 32, 8, 1),
    ("forward", 90, 64, 2): (64, 64, 4, 3),
    ("forward", 90, 128, 2): (128, 64, 8, 3),
    ("key_gradient", 90, 64, 2): (32, 64, 4, 3),
    ("key_gradient", 90, 128, 2): (16, 64, 4, 3),
    ("query_gradient", 90, 64, 2): (64, 32, 4, 3),
    ("query_gradient", 90, 128, 2): (128, 64, 8, 3),
}
