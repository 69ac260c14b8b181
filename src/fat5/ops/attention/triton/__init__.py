"""Attention's Triton backend: backend.py is its face, host.py launches the kernels in the other files."""
