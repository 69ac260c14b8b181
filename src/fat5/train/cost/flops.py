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
from typing import Any

import torch

from fat5.ops.linear import product

DENSE_PEAKS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A30": 165.0,
    "A40": 149.7,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.0,
    "RTX 4090": 165.2,
    "RTX 4080": 97.5,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
}
"""Device name → dense peak in TFLOP/s with 16-bit inputs and float32 accumulation, from the vendors' data sheets."""

GEMM_SIZE = 1024


def training_flops(config: Any, encoder_lengths: torch.Tensor, decoder_lengths: torch.Tensor) -> float:
    """Operations of a forward and backward pass over packed documents.

    Args:
        config: a T5 configuration.
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

    A GPU's is its dense 16-bit peak, halved for fp32 (TF32). A CPU's is measured: the best of five float32 products
    of 1,024 × 1,024 matrices as the model makes them (`fat5.ops.linear`), with the threads that torch uses.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [peak for part, peak in DENSE_PEAKS.items() if part.lower() in name.lower()]
        return known[0] * 1e12 / (2 if precision == "fp32" else 1) if known else None
    if device.type != "cpu":
        return None
    a, b = torch.ones(2, GEMM_SIZE, GEMM_SIZE).unbind()
    product(a, b)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * GEMM_SIZE**3 / best
