"""Floating-point operations of a training step, counted from the model's shapes, and the peak they are held against.

A multiplication and its addition are two operations, and a backward pass is twice its forward pass, so a weight matrix
costs 6 operations a weight a token. For every layer, with d = d_model, a = heads·d_kv, f = d_ff and g = 3 feed-forward
matrices if gated else 2:

    encoder token    4·d·a (self-attention) + g·d·f
    decoder token    4·d·a (self-attention) + 2·d·a (queries and output of cross-attention) + g·d·f
    cross-attention  2·d·a an encoder token and decoder layer (its keys and values are made of encoder tokens)
    head             d·V a decoder token

Attention itself costs 2·2·a·Lq·Lk a document forward (scores, then values); the causal half is not computed. Embedding
lookups, norms and softmax are left out, and recomputation under gradient checkpointing is not useful work.
"""

import time
from typing import Any, NamedTuple

import torch

from fat5.ops.linear import product


class Sheet(NamedTuple):
    """A GPU as its vendor's data sheet has it."""

    peak: float
    """Dense TFLOP/s with 16-bit inputs and float32 accumulation"""
    memory: float
    """GiB, of which about a hundredth is not for programs"""
    bandwidth: float
    """Of the memory, GB/s"""
    link: float
    """To the other GPUs of a node, GB/s each way: NVLink, else PCIe"""


SHEETS = {
    "B200": Sheet(2250.0, 192, 8000, 900),
    "GH200": Sheet(989.0, 96, 4000, 450),
    "H200": Sheet(989.0, 141, 4800, 450),
    "H100 PCIe": Sheet(756.0, 80, 2000, 64),
    "H100 NVL": Sheet(835.0, 94, 3900, 300),
    "H100": Sheet(989.0, 80, 3350, 450),
    "A100": Sheet(312.0, 80, 2039, 300),
    "A10G": Sheet(70.0, 24, 600, 32),
    "A10": Sheet(125.0, 24, 600, 32),
    "A30": Sheet(165.0, 24, 933, 32),
    "A40": Sheet(149.7, 48, 696, 32),
    "L40S": Sheet(362.0, 48, 864, 32),
    "L40": Sheet(181.0, 48, 864, 32),
    "L4": Sheet(121.0, 24, 300, 32),
    "RTX 6000 Ada": Sheet(364.0, 48, 960, 32),
    "RTX 4090": Sheet(165.2, 24, 1008, 32),
    "RTX 4080": Sheet(97.5, 16, 717, 32),
    "RTX 3090": Sheet(71.0, 24, 936, 32),
    "V100": Sheet(125.0, 32, 900, 150),
    "T4": Sheet(65.0, 16, 320, 16),
}
"""Part of a device's name → its sheet; the first that fits."""

GEMM_SIZE = 1024


def sheet_of(name: str) -> Sheet | None:
    """The sheet of a GPU by its name, as torch or a user gives it."""
    return next((sheet for part, sheet in SHEETS.items() if part.lower() in name.lower()), None)


def training_flops(config: Any, encoder_lengths: torch.Tensor, decoder_lengths: torch.Tensor) -> float:
    """Operations of a forward and backward pass over packed documents.

    Args:
        encoder_lengths, decoder_lengths: (N,) tokens of each document's two sides, on the host.
    """
    encoder, decoder = encoder_lengths.double(), decoder_lengths.double()
    attention = config.num_heads * config.d_kv
    feed_forward = (3 if config.is_gated_act else 2) * config.d_model * config.d_ff
    projection = config.d_model * attention
    cross_keys = 2 * projection * config.num_decoder_layers
    matrices = encoder.sum() * (config.num_layers * (4 * projection + feed_forward) + cross_keys)
    matrices += decoder.sum() * (
        config.num_decoder_layers * (6 * projection + feed_forward) + config.d_model * config.vocab_size
    )
    scores = config.num_layers * (encoder**2).sum()
    scores += config.num_decoder_layers * ((decoder**2).sum() / 2 + (encoder * decoder).sum())
    return float(6 * matrices + 12 * attention * scores)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations a second that the device could do at best; None for a GPU that the table does not know.

    A GPU's is its dense 16-bit peak, halved for fp32 (TF32). A CPU's is measured: the best of five products of
    1,024 × 1,024 matrices as the model makes them, in bfloat16 or in float32 (`fat5.ops.linear`), with the threads that
    torch uses.
    """
    if device.type == "cuda":
        sheet = sheet_of(torch.cuda.get_device_name(device))
        return sheet.peak * 1e12 / (2 if precision == "fp32" else 1) if sheet else None
    if device.type != "cpu":
        return None
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    a, b = torch.ones(2, GEMM_SIZE, GEMM_SIZE, dtype=dtype).unbind()
    product(a, b)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * GEMM_SIZE**3 / best
