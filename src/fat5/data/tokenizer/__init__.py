"""The tokenizer: training it, reading it, encoding documents with it."""
