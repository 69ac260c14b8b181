"""(kernel, architecture, head dimension up to, bytes an element) -> (block_m, block_n, num_warps, num_stages)."""

TABLE: dict[tuple[str, int, int, int], tuple[int, int, int, int]] = {
    (kernel, arch, width, size): (64, 64, 4, 2) if size == 2 else (32, 32, 4, 1)
    for kernel in ("forward", "query_gradient", "key_gradient", "band", "dense_gradient")
    for arch in (80, 86, 89, 90, 100)
    for width in (64, 128)
    for size in (2, 4)
}
