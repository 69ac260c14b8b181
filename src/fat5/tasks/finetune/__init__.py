"""Fine-tuning: examples of a task, their packed batches, the run, and what it scores."""
