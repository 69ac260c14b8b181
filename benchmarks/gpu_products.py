"""The matrix products of a training step alone: what each shape reaches, their sum for a step, and whether products
that share an input would be faster as one.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from fat5.model import FAT5Config
from gpu_measure import Results
from gpu_step import DEVICE, VOCABULARY, say


def products(results: Results, options: argparse.Namespace) -> None:
    """Each preset's weight shapes on `--tokens` rows: forward, gradient of the input, gradient of the weight."""
    for preset in options.presets.split(","):
        config = FAT5Config.preset(preset, vocab_size=VOCABULARY)
        rows, whole, operations = options.tokens, 0.0, 0.0
        for name, (count, width, outputs) in shapes(config).items():
            taken = _seconds(rows, width, outputs)
            rate = 6 * rows * width * outputs / taken / 1e12
            results.add(f"{preset} {name}", "torch", "matrix products", rate, "TFLOP/s")
            say(f"{preset} {name:22} {count:3} x {width}x{outputs}: {taken * 1e6:8.1f} us, {rate:.0f} TFLOP/s")
            if count:
                whole += count * taken
                operations += count * 6 * rows * width * outputs
        results.add(preset, "torch", "matrix products of a step", whole, "s")
        results.write()
        say(f"{preset}: {whole * 1e3:.1f} ms of products a step, {operations / whole / 1e12:.0f} TFLOP/s")


def shapes(config: FAT5Config) -> dict[str, tuple[int, int, int]]:
    """Name → how many in a step on as many encoder as decoder tokens, inputs, outputs; 0 of those that do not exist."""
    d, a, f = config.d_model, config.num_heads * config.d_kv, config.d_ff
    encoder, decoder = config.num_layers, config.num_decoder_layers
    return {
        "q, k, v": (3 * encoder + 6 * decoder, d, a),
        "q, k, v as one": (0, d, 3 * a),
        "k, v as one": (0, d, 2 * a),
        "k, v of all layers": (0, d, 2 * a * decoder),
        "o": (encoder + 2 * decoder, a, d),
        "gate, up": (2 * (encoder + decoder), d, f),
        "gate, up as one": (0, d, 2 * f),
        "down": (encoder + decoder, f, d),
        "head": (1, d, config.vocab_size),
    }


def _seconds(rows: int, width: int, outputs: int) -> float:
    """Median of a forward product and both of its backward."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator).to(dtype)

    x, weight, grad = draw(rows, width), draw(outputs, width) * width**-0.5, draw(rows, outputs)
    calls: list[Callable[[], torch.Tensor]] = [lambda: x @ weight.t(), lambda: grad @ weight, lambda: grad.t() @ x]
    if DEVICE.type == "cuda":
        from fat5.bench.timing import seconds

        return float(sum(np.median(seconds(call, budget=0.02)) for call in calls))
    started = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - started
