"""Recording what runs on a GPU as a CUDA graph, so that the host starts all of it with one call."""

from collections.abc import Callable
from typing import Any

import torch


def record(run: Callable[[], Any], device: torch.device, pool: Any = None) -> tuple[Any, Any, Any]:
    """Records `run` behind a warm-up.

    Args:
        run: reads and writes tensors at fixed addresses, and waits for nothing.
        pool: of an earlier graph, whose memory this one shares if the two never run at once.

    Returns:
        The graph, what the recorded run returned (filled by `graph.replay()`), and what the warm-up returned.

    Raises:
        RuntimeError: what `run` does cannot be recorded.
    """
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    side, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    # A weight that autocast had cast before would be gone at the next call, so a graph casts its own.
    with torch.cuda.device(device), torch.autocast(device.type, dtype, enabled, cache_enabled=False):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            warm = run()
        torch.cuda.current_stream().wait_stream(side)
        # Other threads may go on with theirs: one pins the next batch, one writes a checkpoint.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = run()
    return graph, out, warm
