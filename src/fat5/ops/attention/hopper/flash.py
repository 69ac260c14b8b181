"""Our own copies of flash-attn-4's interface, whose kernel classes carry the hooks of hooks.py.

The interface is a module of functions that read the kernel classes and the tile sizes from its globals, and keep what
they compiled. Each copy is that same file loaded once more under a name of our own, so that another user of the package
in this process meets its own module, untouched.
"""

import hashlib
import importlib.util
import sys
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from flash_attn.cute import interface

from fat5.ops.attention.hopper import hooks


@lru_cache(maxsize=2)
def copy_with(learning: bool) -> ModuleType:
    """The interface with the relative bias; `learning`: whose backward also leaves the sums of dS by distance."""
    name = f"{__name__}_{'learning' if learning else 'biased'}"
    assert interface.__file__ is not None
    spec = importlib.util.spec_from_file_location(name, interface.__file__)
    assert isinstance(spec, ModuleSpec)
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    names = vars(module)
    # Their compilations are kept once for all.
    names |= {same: getattr(interface, same) for same in ("_bwd_preprocess", "_bwd_postprocess_convert")}
    names["FlashAttentionForwardSm90"] = hooks.BiasedForward
    names["FlashAttentionBackwardSm90"] = hooks.LearningBackward if learning else hooks.BiasedBackward
    sizes = module._tile_size_bwd_sm90
    # The sizes of causal calls leave registers for the bias and its sums at D 128; at D 64 they are the same.
    names["_tile_size_bwd_sm90"] = lambda head_dim, head_dim_v, _causal, *more, **named: sizes(
        head_dim, head_dim_v, True, *more, **named
    )
    return module


# What is compiled depends on all of hooks.py; the package would take the hash of the function it is given, and keeps
# compilations on disk by it when told to.
assert hooks.__file__ is not None
_SOURCE = hashlib.sha256(Path(hooks.__file__).read_bytes()).hexdigest()
for _hook in (hooks.score, hooks.scaled_score, hooks.score_gradient):
    _hook.__cute_hash__ = f"fat5 {_hook.__name__} {_SOURCE}"
