"""Attention's CPU backend, compiled by numba."""
