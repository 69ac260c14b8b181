"""Attention's Triton backend."""
