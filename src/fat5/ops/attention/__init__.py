"""Attention with a learned relative bias: one public function, several backends that must agree.

reference.py is the specification; cpu/ is the CPU path in linear memory, triton/ holds the GPU kernels, hopper/ what we
hook into those of flash-attn-4; crosscheck.py runs the same call through PyTorch's own SDPA and FlexAttention. api.py
validates a call (call.py) and chooses; op.py registers the operators.
"""

from fat5.ops.attention.api import BACKENDS, attention
from fat5.ops.attention.bias import RelativeBias
from fat5.ops.attention.reference import attention_weights

__all__ = ["BACKENDS", "RelativeBias", "attention", "attention_weights"]
