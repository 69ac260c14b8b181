"""A stock T5 of transformers on FAT5's attention and without padding: it generates, then trains one step.

python examples/stock_transformers.py google/flan-t5-small
"""

import argparse

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import fat5

PAIRS = {
    "translate English to German: The house is small.": "Das Haus ist klein.",
    "translate English to German: I installed the package, and then I read its documentation.": (
        "Ich habe das Paket installiert und dann seine Dokumentation gelesen."
    ),
}

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("model", nargs="?", default="google/flan-t5-small", help="a T5, mT5 or umT5: name or folder")
arguments.add_argument("--max_new_tokens", default=32, type=int)


def main() -> None:
    args = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSeq2SeqLM.from_pretrained(args.model).to(device)
    fat5.accelerate(model)  # in place; the same tokens, losses and gradients, up to rounding

    batch = tokenizer(list(PAIRS), padding=True, return_tensors="pt").to(device)
    written = model.generate(**batch, max_new_tokens=args.max_new_tokens)
    for source, answer in zip(PAIRS, tokenizer.batch_decode(written, skip_special_tokens=True)):
        print(f"{source} -> {answer}")

    labels = tokenizer(text_target=list(PAIRS.values()), padding=True, return_tensors="pt").input_ids.to(device)
    batch["labels"] = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    before = model(**batch).loss  # without dropout, since from_pretrained gives a model in eval(): the two compare
    before.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(**batch).loss
    print(f"loss {before.item():.3f}, after one step {after.item():.3f}")


if __name__ == "__main__":
    main()
