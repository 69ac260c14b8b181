"""(kernel, architecture, head dimension up to, bytes an element) -> (block_m, block_n, num_warps, num_stages)."""

TABLE: dict[tuple[str, int, int, int], tuple[int, int, int, int]] = {}
for _arch in (80, 86, 89, 90, 100):
    for _kernel, _rows in {
        "forward": ((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 4, 1), (32, 32, 4, 1)),
        "query_gradient": ((128, 64, 8, 2), (64, 64, 8, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        "key_gradient": ((32, 128, 8, 2), (64, 64, 8, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        "band": ((64, 64, 8, 2), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        "dense_gradient": ((64, 64, 8, 1), (64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    }.items():
        for _place, _row in zip(((64, 2), (128, 2), (64, 4), (128, 4)), _rows):
            TABLE[(_kernel, _arch, *_place)] = _row
TABLE |= {
    ("forward", 90, 64, 2): (128, 64, 8, 2),
    ("query_gradient", 90, 64, 2): (128, 64, 8, 2),
    ("key_gradient", 90, 64, 2): (64, 128, 8, 3),
    ("band", 90, 64, 2): (64, 64, 8, 2),
    ("forward", 90, 128, 2): (128, 64, 8, 3),
    ("query_gradient", 90, 128, 2): (128, 64, 8, 3),
    ("key_gradient", 90, 128, 2): (32, 64, 8, 2),
    ("band", 90, 128, 2): (64, 64, 8, 2),
    ("forward", 90, 64, 4): (64, 32, 4, 2),
    ("query_gradient", 90, 64, 4): (64, 32, 4, 2),
    ("band", 90, 64, 4): (64, 32, 4, 2),
}
