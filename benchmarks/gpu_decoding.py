"""One greedy step of decoding on a GPU, in a CUDA graph, by the launch sizes of its kernels: which are the best?

    PYTHONPATH=src python3 benchmarks/gpu_decoding.py --output_dir results [--preset fat5-base] [--rows 8]

A step reads each weight of the decoder once, so its time stands beside that of a copy of as many bytes.
"""

import argparse
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch

from fat5.generate.replay import SharedStep
from fat5.generate.step import DecoderWeights
from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from fat5.ops import use_kernels
from fat5.ops.triton import few_rows
from gpu_measure import Results
from gpu_step import DEVICE, VOCABULARY, say

SIZES = {"OUTPUTS": (16, 8, 32), "WEIGHT_BYTES": (256, 512), "WARPS": (4, 2, 8), "STAGES": (4, 3, 6)}
"""The shipped ones first."""
STEPS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--preset", default="fat5-base")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120.0, help="nothing new starts after this")
    options = parser.parse_args()
    results = Results(options.output_dir, "gpu_decoding")
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = FAT5ForConditionalGeneration(FAT5Config.preset(options.preset, vocab_size=VOCABULARY))
    model = model.to(torch.bfloat16).eval()
    read = sum(p.numel() * p.element_size() for part in (model.decoder, model.lm_head) for p in part.parameters())
    read -= model.shared.weight.numel() * model.shared.weight.element_size()
    name = f"{options.preset} greedy step, {options.rows} rows"
    say(f"{name}: {read / 2**20:.0f} MiB of weights")
    shipped = {size: getattr(few_rows, size) for size in SIZES}
    # One size at a time, then the pairs that matter most together.
    tried = [shipped | {size: value} for size, values in SIZES.items() for value in values]
    tried += [shipped | {"OUTPUTS": a, "WARPS": b} for a, b in product((8, 32), (2, 8))]
    for sizes in [{}, *(one for n, one in enumerate(tried) if one not in tried[:n])]:
        if results.elapsed() > options.seconds:
            say("out of time")
            break
        before = use_kernels("decoding=triton" if sizes else "decoding=plain")
        for size, value in sizes.items():
            setattr(few_rows, size, value)
        key = " ".join(f"{size.lower()} {value}" for size, value in sizes.items()) or "PyTorch's kernels"
        try:
            taken = _step(model, options.rows)
        except Exception as failure:  # a size that does not fit
            say(f"{key}: {type(failure).__name__} {str(failure)[:120]}")
            continue
        finally:
            use_kernels(before)
        results.add(name, key, "time of a step", taken, "s")
        say(f"{key}: {np.median(taken) * 1e6:.0f} µs, {read / np.median(taken) / 1e12:.2f} TB/s of weights")
        results.write()


@torch.inference_mode()
def _step(model: FAT5ForConditionalGeneration, rows: int) -> np.ndarray:
    """Seconds of each of STEPS steps behind as many."""
    memory = torch.randn(rows, 128, model.config.d_model, device=DEVICE, dtype=torch.bfloat16)
    step = SharedStep(DecoderWeights(model), memory, 2 * STEPS, 1)
    step.load(memory, None)
    first, nothing = torch.zeros(rows, dtype=torch.long, device=DEVICE), torch.zeros(0, dtype=torch.long, device=DEVICE)
    if step.fused is not None:
        _, advance = step.greedy(first, nothing, 0)
    else:
        tokens, position = first, iter(range(2 * STEPS))

        def advance() -> None:
            nonlocal tokens
            tokens = step(tokens, next(position)).argmax(-1)

    for _ in range(STEPS):
        advance()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    for mark in marks[:-1]:
        mark.record()
        advance()
    marks[-1].record()
    torch.cuda.synchronize()
    assert not step.failed
    return np.array([begun.elapsed_time(ended) / 1e3 for begun, ended in pairwise(marks)])


if __name__ == "__main__":
    main()
