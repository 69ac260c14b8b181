"""Hopper: our relative bias and the gradient of its vector inside the kernels of flash-attn-4."""
