"""Models of stock transformers on our attention: `fat5.accelerate`, and `attn_implementation="fat5"`."""

from fat5.stock.accelerated import accelerate
from fat5.stock.attention_interface import register

register()

__all__ = ["accelerate"]
