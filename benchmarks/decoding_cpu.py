"""C4: how fast does the decoding loop write beside stock `generate`? Stock T5 class, the same weights, the CPU.

python benchmarks/decoding_cpu.py [--threads 2] [--repeats 5] [--cases demo small ...]

Weights are random and no token ends a row, so that every run writes all its tokens; the tokens of both are compared.
Encoding the prompts is inside the clock, and so is laying out the weights.
"""

import argparse
from functools import partial

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

import measure
from fat5.generate.decoding import generate
from fat5.model import PRESETS

# name: preset, batch, longest prompt, new tokens, keyword arguments
CASES = {
    "demo": ("fat5-demo", 8, 64, 128, {}),
    "demo-sample": ("fat5-demo", 8, 64, 128, {"do_sample": True, "top_k": 50, "top_p": 0.9}),
    "demo-beam4": ("fat5-demo", 8, 64, 128, {"num_beams": 4}),
    "demo-prompt512": ("fat5-demo", 8, 512, 128, {}),
    "demo-batch1": ("fat5-demo", 1, 64, 128, {}),
    "small": ("fat5-small", 8, 64, 128, {}),
}


def stock_t5(preset: str) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(**PRESETS[preset], decoder_start_token_id=0)
    config.eos_token_id = None
    model = T5ForConditionalGeneration(config).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model))
    model.generation_config.eos_token_id = None
    return model


def prompts(batch: int, length: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Rows from half the length to the whole."""
    mask = torch.arange(length) < torch.linspace(length / 2, length, batch).round()[:, None]
    ids = torch.randint(2, vocabulary, (batch, length))
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def measure_case(name: str, repeats: int) -> list[dict[str, object]]:
    preset, batch, length, new, how = CASES[name]
    model = stock_t5(preset)
    inputs = prompts(batch, length, model.config.vocab_size)
    providers = {
        "stock generate": partial(model.generate, **inputs, max_new_tokens=new, **({"do_sample": False} | how)),
        "fat5 loop": partial(generate, model, **inputs, max_new_tokens=new, **how),
    }
    written = []
    for run in providers.values():
        torch.manual_seed(1)
        written.append(run())
    same = (written[0] == written[1]).all(dim=1).float().mean().item()
    seconds = measure.interleaved(providers, repeats=repeats, warmup=0)
    case = f"{name} B{batch} L{length} N{new}"
    rows = [measure.row(case, provider, "generation", values, "s") for provider, values in seconds.items()]
    rows.append(measure.row(case, "fat5 loop", "speed", batch * new / seconds["fat5 loop"], "tokens/s"))
    ratio = seconds["stock generate"] / seconds["fat5 loop"]
    rows.append(measure.row(case, "stock / fat5", "speed-up", ratio, "ratio"))
    rows.append(measure.row(case, "stock = fat5", "rows with the same tokens", np.array([same]), "share"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [row for name in arguments.cases for row in measure_case(name, arguments.repeats)]
    measure.save("decoding_cpu", rows)


if __name__ == "__main__":
    main()
