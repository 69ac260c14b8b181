"""A stock T5 pretrained further with UL2, in the Trainer of transformers.

python examples/collator_with_trainer.py google/t5-v1_1-small --output_dir runs/ul2
"""

import argparse

from datasets import load_dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Trainer, TrainingArguments

from fat5.data import DataCollatorForUL2, sample_path

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("model", nargs="?", default="google/t5-v1_1-small", help="a T5: name or folder")
arguments.add_argument("--text", default=str(sample_path("fr")), help="JSONL with a column text")
arguments.add_argument("--output_dir", required=True)
arguments.add_argument("--max_tokens", default=512, type=int)
arguments.add_argument("--batch_size", default=8, type=int)
arguments.add_argument("--steps", default=1000, type=int)


def main() -> None:
    args = arguments.parse_args()
    model = AutoModelForSeq2SeqLM.from_pretrained(args.model)
    collator = DataCollatorForUL2(AutoTokenizer.from_pretrained(args.model), "fat5", max_tokens=args.max_tokens)
    if model.config.vocab_size < collator.tokenizer.size:  # [R], [S] and [X] may need rows
        model.resize_token_embeddings(collator.tokenizer.info.vocab_size)
    texts = load_dataset("json", data_files=args.text, split="train")
    documents = texts.map(collator.pieces, batched=True, remove_columns=texts.column_names)
    settings = TrainingArguments(
        args.output_dir,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=1e-3,
        logging_steps=max(1, args.steps // 20),
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model, settings, train_dataset=documents, data_collator=collator)
    trainer.train()
    trainer.save_model()  # with the collator's tokenizer
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"loss {losses[0]:.3f}, at the end {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
