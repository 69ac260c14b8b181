"""Attention with a learned relative bias: one public function, several backends that must agree.

reference.py is the specification, cpu.py the linear-memory CPU path, triton_*.py the GPU kernels, crosscheck.py runs
the
same problem through PyTorch's own SDPA and FlexAttention; api.py validates and chooses.
"""

from fat5.ops.attention.api import BACKENDS, attention
from fat5.ops.attention.bias import RelativeBias
from fat5.ops.attention.reference import attention_weights

__all__ = ["BACKENDS", "RelativeBias", "attention", "attention_weights"]
