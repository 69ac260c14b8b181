"""Every test: one thread, no hub, no tuned rows of this machine, no wait for a disk, and memory that starts as NaN."""

import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the processes that tests start too: two workers share the cores
os.environ["FAT5_CACHE"] = "/no/such/folder"  # so that the shipped launch table is tested

import pytest
import torch
import torch.utils._device  # not loaded by torch itself
from hypothesis import settings
from torch import Tensor

# The same examples in every run; `pytest --hypothesis-profile default` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton reads it when it is imported, which any test file may bring about, so it stands here.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Only a power cut shows what fsync is for; a busy disk makes the suite wait for a second at some of its thousands.
os.fsync = lambda descriptor: (os.fstat(descriptor), None)[1]


def pytest_collection_finish() -> None:
    """The collector need not walk through torch and transformers each time: what is imported stays."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Commands that tests run are forked from this process as it is before the first test."""
    if "made_run" in sys.modules:
        sys.modules["made_run"].Forked.serve()


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def poisoned(*args: Any, **options: Any) -> Tensor:
        made = allocate(*args, **options)
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or made.layout != torch.strided:
            return made
        wide = made.dtype.itemsize > 1
        with torch.no_grad():
            if wide and (made.is_floating_point() or made.is_complex()):
                made.fill_(float("nan"))
            elif wide and not made.is_quantized:
                made.fill_(torch.iinfo(made.dtype).max)
        return made

    return poisoned


@pytest.fixture(scope="session", autouse=True)
def _memory_starts_as_nan() -> Iterator[None]:
    """torch.empty and its kin give NaN or the largest integer, so that what nobody writes shows."""
    # `with torch.device(...)` and torch.compile recognise these functions by identity: their lists come first.
    torch.utils._device._device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def _language_patched_once() -> None:
    """Triton's interpreter patches triton.language at every call of a function: a third of an interpreted kernel."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or "TRITON_INTERPRET" not in os.environ:
        return
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Callable[..., Any]) -> Any:
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch(function)  # for good: nothing is compiled in this process
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


@pytest.fixture(autouse=True)
def _same_seed_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread_again() -> None:
    # Libraries under test raise it, and a child forked after OpenMP has run two threads waits for the second for ever.
    torch.set_num_threads(1)
