"""Every test: one torch thread, no hub, and no accident with the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

# The same examples in every run; `pytest --hypothesis-profile default` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Triton reads it when it is imported, which any test file may bring about, so it stands here.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _same_seed_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread_again() -> None:
    # Libraries under test raise it, and a child forked after OpenMP has run two threads waits for the second for ever.
    torch.set_num_threads(1)
