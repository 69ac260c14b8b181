"""Triton kernels that are not attention, and how every kernel is launched."""
