"""Tensor operations: tensors in, tensors out. Each has a plain-PyTorch reference beside its fast form
(docs/attention.md).
"""

from fat5.ops.attention import BACKENDS, RelativeBias, attention, attention_weights
from fat5.ops.choice import is_recorded, use_kernels
from fat5.ops.dropout import Dropout
from fat5.ops.embedding import embedding
from fat5.ops.geglu import geglu, geglu_joined
from fat5.ops.linear import is_hooked, is_plain, linear
from fat5.ops.linear_cross_entropy import linear_cross_entropy, token_statistics
from fat5.ops.rms_norm import rms_norm
from fat5.ops.rotary import rotary

__all__ = [
    "BACKENDS",
    "Dropout",
    "RelativeBias",
    "attention",
    "attention_weights",
    "embedding",
    "geglu",
    "geglu_joined",
    "is_hooked",
    "is_plain",
    "is_recorded",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "token_statistics",
    "use_kernels",
]
