"""Goes on pretraining a stock T5 with UL2, in the Trainer of transformers, on the sample corpus or your own JSONL.

python examples/collator_with_trainer.py --model google/t5-v1_1-small --output_dir runs/ul2
"""

import argparse

from datasets import load_dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Trainer, TrainingArguments

from fat5.data import DataCollatorForUL2, sample_path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="google/t5-v1_1-small", help="a T5 of the hub, or a folder")
parser.add_argument("--text", default=str(sample_path("fr")), help="JSONL with a column text")
parser.add_argument("--output_dir", required=True)
parser.add_argument("--max_tokens", type=int, default=512)
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--steps", type=int, default=1000)
given = parser.parse_args()

model = AutoModelForSeq2SeqLM.from_pretrained(given.model)
collator = DataCollatorForUL2(AutoTokenizer.from_pretrained(given.model), "fat5", max_tokens=given.max_tokens)
if model.config.vocab_size < collator.tokenizer.size:  # [R], [S] and [X] may need new rows
    model.resize_token_embeddings(collator.tokenizer.info.vocab_size)

texts = load_dataset("json", data_files=given.text, split="train")
documents = texts.map(collator.pieces, batched=True, remove_columns=texts.column_names)
arguments = TrainingArguments(
    given.output_dir,
    max_steps=given.steps,
    per_device_train_batch_size=given.batch_size,
    learning_rate=1e-4,
    save_strategy="no",
    report_to="none",
)
trainer = Trainer(model, arguments, train_dataset=documents, data_collator=collator)
trainer.train()
trainer.save_model(given.output_dir)  # and the collator's tokenizer
