"""C2: useful tokens a second of a training step on the CPU, packed FAT5 against stock transformers T5 (sdpa) on
padded batches.

Both train the demo model on the same French UL2 examples with the same optimizer, one optimizer step a pack. The
stock model gets each pack's examples in dynamically padded batches, in the order of the stream or sorted by length. A
useful token is an encoder token of a document or a target; padding does not count.

python benchmarks/training_cpu.py [--packs 4] [--batch-size 16] [--compiled] [--profile]
"""

import argparse
import gzip
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

import measure
from fat5.data import (
    MixtureOfDenoisers,
    PackedBatch,
    PackedLoader,
    PieceStream,
    load_tokenizer,
    open_shards,
    sample_path,
)
from fat5.data.examples.config import BatchConfig
from fat5.data.examples.padded import pad, unpack
from fat5.data.shards.prepare import PrepareConfig, prepare
from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer
from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from fat5.optim import AdamWScale


def batches(packs: int, vocab_size: int, encoder_tokens: int, decoder_tokens: int) -> tuple[list[PackedBatch], int]:
    """Packs of the sample's French paragraphs, by the real pipeline, and the vocabulary's size."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = gzip.decompress(Path(sample_path("fr")).read_bytes())
        (folder / "fr.jsonl").write_bytes(text)
        inputs = [str(folder / "fr.jsonl")]
        train_tokenizer(TokenizerTraining(inputs, str(folder / "tokenizer"), vocab_size=vocab_size))
        prepare(PrepareConfig(inputs, str(folder / "tokenizer"), str(folder / "shards"), workers=1))
        info = load_tokenizer(folder / "shards" / "tokenizer").info
        config = BatchConfig(
            encoder_tokens=encoder_tokens, decoder_tokens=decoder_tokens, packs_per_step=1, max_tokens=512
        )
        shards, mixture = open_shards(folder / "shards", "train"), MixtureOfDenoisers.named("fat5")
        batches = iter(PackedLoader(PieceStream([shards], mixture, info, config.max_tokens, seed=0), config))
        return [next(batches) for _ in range(packs)], info.vocab_size


def useful(batch: PackedBatch) -> int:
    return int(batch.cu_seqlens[-1]) + int((batch.labels != -100).sum())


def packed_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[PackedBatch], float]:
    def step(batch: PackedBatch) -> float:
        loss = model(
            input_ids=batch.input_ids, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, labels=batch.labels,
            decoder_cu_seqlens=batch.decoder_cu_seqlens, decoder_max_seqlen=batch.decoder_max_seqlen,
        ).loss  # fmt: skip
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def padded_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch_size: int, by_length: bool
) -> Callable[[PackedBatch], float]:
    def step(batch: PackedBatch) -> float:
        examples = unpack(batch)
        if by_length:
            examples.sort(key=lambda example: (len(example[0]), len(example[1])))
        targets = sum(len(target) for _, target in examples)
        total = 0.0
        for first in range(0, len(examples), batch_size):
            sources, labels = zip(*examples[first : first + batch_size])
            padded = pad(sources, labels, 0)
            share = sum(len(target) for target in labels) / targets
            loss = model(**padded, use_cache=False).loss * share
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def models(vocab_size: int) -> tuple[FAT5ForConditionalGeneration, Callable[[], T5ForConditionalGeneration]]:
    """The demo model, and a maker of stock models with its weights."""
    torch.manual_seed(0)
    ours = FAT5ForConditionalGeneration(FAT5Config.preset("fat5-demo", vocab_size=vocab_size))
    keys = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "dropout_rate")
    common = {key: getattr(ours.config, key) for key in keys}

    def stock() -> T5ForConditionalGeneration:
        config = T5Config(
            **common, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
            attn_implementation="sdpa",
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
        model.load_state_dict(ours.state_dict())
        return model

    return ours.train(), stock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--encoder-tokens", type=int, default=3584)
    parser.add_argument("--decoder-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="compare both models under torch.compile as well")
    parser.add_argument("--profile", action="store_true", help="print where our step's time goes, and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    packs, vocab_size = batches(
        arguments.packs + 1, arguments.vocab_size, arguments.encoder_tokens, arguments.decoder_tokens
    )
    ours, stock = models(vocab_size)

    def optimizer(model: torch.nn.Module) -> AdamWScale:
        return AdamWScale(model.parameters(), lr=1e-3)

    if arguments.profile:
        step = packed_step(ours, optimizer(ours))
        step(packs[0])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            step(packs[1])
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60))
        return
    steps = {"fat5, packed": packed_step(ours, optimizer(ours))}
    for name, by_length in (("hf sdpa, padded", False), ("hf sdpa, padded, sorted by length", True)):
        model = stock()
        steps[name] = padded_step(model, optimizer(model), arguments.batch_size, by_length)
    if arguments.compiled:
        mine, theirs = models(vocab_size)[0], stock()
        steps["fat5, packed, compiled"] = packed_step(torch.compile(mine, fullgraph=True), optimizer(mine))
        compiled = torch.compile(theirs, dynamic=True)
        steps["hf sdpa, padded, compiled"] = padded_step(compiled, optimizer(theirs), arguments.batch_size, False)
    first = {name: step(packs[0]) for name, step in steps.items()}
    print("first losses:", {name: round(loss, 4) for name, loss in first.items()})
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for batch in packs[1:]:
        seconds = measure.interleaved({name: lambda s=step, b=batch: s(b) for name, step in steps.items()}, 1, 0)
        for name, value in seconds.items():
            speeds[name].append(useful(batch) / value[0])
    case = f"demo-V{vocab_size}"
    samples = {name: np.array(values) for name, values in speeds.items()}
    rows = [measure.row(case, name, "useful tokens/s", values, "tokens/s") for name, values in samples.items()]
    for name, values in samples.items():
        if name.startswith("hf"):
            own = samples["fat5, packed, compiled" if name.endswith("compiled") else "fat5, packed"]
            rows.append(measure.row(case, f"fat5 / {name}", "speed-up", own / values, "ratio"))
    measure.save("training_cpu", rows)


if __name__ == "__main__":
    main()
