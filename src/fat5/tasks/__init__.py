"""Tasks: what a trained model is used for."""

from fat5.tasks.complete import Completion, Decoding, complete

__all__ = ["Completion", "Decoding", "complete"]
