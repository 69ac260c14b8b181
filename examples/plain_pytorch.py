"""A FAT5 model trained on packed batches by a plain PyTorch loop; the folder it writes is a stock T5.

sh examples/command_line.sh          # makes example/shards
python examples/plain_pytorch.py --shards example/shards --output_dir example/plain
"""

import argparse
import json

import torch

from fat5 import FAT5Config, FAT5ForConditionalGeneration
from fat5.data import BatchConfig, MixtureOfDenoisers, PackedLoader, PieceStream, load_tokenizer, open_shards
from fat5.optim import AdamWScale

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--shards", default="example/shards", help="a folder that `fat5 prepare` wrote")
arguments.add_argument("--output_dir", default="example/plain")
arguments.add_argument("--preset", default="fat5-demo")
arguments.add_argument("--overrides", default="{}", type=json.loads, help="keys of FAT5Config, as JSON")
arguments.add_argument("--steps", default=200, type=int)
arguments.add_argument("--max_tokens", default=256, type=int, help="tokens of one document; longer ones are cut")
arguments.add_argument("--encoder_tokens", default=1024, type=int, help="encoder tokens of a batch")


def main() -> None:
    args = arguments.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(f"{args.shards}/tokenizer")
    info = tokenizer.info
    config = FAT5Config.preset(
        args.preset, vocab_size=info.vocab_size, pad_token_id=info.pad_id, eos_token_id=info.eos_id,
        decoder_start_token_id=info.pad_id, **args.overrides,
    )  # fmt: skip
    model = FAT5ForConditionalGeneration(config).to(device).train()
    optimizer = AdamWScale(model.parameters(), lr=1e-2)

    # Batches of static shape: no padding between documents, and each document attends only to itself.
    mixture = MixtureOfDenoisers.named("fat5")
    stream = PieceStream([open_shards(args.shards)], mixture, info, args.max_tokens, seed=0)
    shapes = BatchConfig(args.max_tokens, args.encoder_tokens, args.encoder_tokens, packs_per_step=1)
    for step, batch in zip(range(1, args.steps + 1), PackedLoader(stream, shapes)):
        loss = model(**batch.to(device).model_inputs()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 10 == 0 or step == args.steps:
            print(f"step {step}: loss {loss.item():.3f}, {batch.num_examples} documents")

    model.save_pretrained(args.output_dir)
    tokenizer.save(args.output_dir)
    print(f"wrote {args.output_dir}, which AutoModelForSeq2SeqLM of transformers loads")


if __name__ == "__main__":
    main()
