"""The random generators of every process in a checkpoint: torch (host and its GPU), NumPy and Python.

rng.safetensors and rng.json are those of the main process; rng-1, rng-2, … those of the others. A process continues the
generators that were saved under its number; one that finds none, since there were fewer processes, starts them from a
seed made of the run's seed, the step and its number.
"""

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from fat5.errors import CheckpointError
from fat5.files import is_count, is_number, read_object
from fat5.train.checkpoint.files import read_manifest, read_tensors
from fat5.train.world import World

_MT19937_WORDS = 624  # NumPy does not check the position, and would read behind the words

RandomState = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and JSON of one process"""


def rng_files(rank: int) -> tuple[str, str]:
    """Names of the files with the tensors and the facts of a process."""
    stem = f"rng-{rank}" if rank else "rng"
    return f"{stem}.safetensors", f"{stem}.json"


def seed_generators(*numbers: int) -> None:
    """Starts the generators of this process from a seed made of numbers: the run's seed, the step, the rank."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def gather_random_states(world: World) -> list[RandomState]:
    """The generators of every process, by rank; called by all of them."""
    tensors, facts = capture_random_state()
    if world.size == 1:
        return [(tensors, facts)]
    return list(zip(map(load, world.gather_bytes(save(tensors))), world.gather(facts), strict=True))


def count_processes(folder: Path) -> int:
    """How many processes' generators a checkpoint has."""
    files, count = read_manifest(folder)["files"], 1  # what the manifest does not name is not verified
    while rng_files(count)[0] in files:
        count += 1
    return count


def capture_random_state() -> RandomState:
    """The generators of this process."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "torch": torch.get_rng_state().clone(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if torch.cuda.is_available():
        tensors["cuda.0"] = torch.cuda.get_rng_state().clone()
    facts = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {"kind": kind, "position": position, "has_gauss": has_gauss, "cached": cached},
    }
    return tensors, facts


def restore_random_state(folder: Path, rank: int = 0) -> None:
    """Puts every generator of a process back to where the checkpoint found it.

    Raises:
        CheckpointError: a state that a generator does not take.
    """
    tensor_file, fact_file = rng_files(rank)
    tensors, facts = read_tensors(folder / tensor_file), read_object(folder / fact_file, CheckpointError)
    try:
        torch.set_rng_state(tensors["torch"])
        if "cuda.0" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda.0"])
        python, numpy = facts["python"], facts["numpy"]
        if (
            not (python["gauss"] is None or is_number(python["gauss"]))
            or not is_count(numpy["position"])
            or numpy["position"] > _MT19937_WORDS
        ):
            raise ValueError("not the state of a Mersenne twister")
        random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss"]))
        keys = tensors["numpy"].numpy().astype(np.uint32)
        np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError("does not hold the state of the random generators", where=folder / fact_file) from error


def restore_generators(folder: Path, rank: int, seed: int, step: int) -> None:
    """Puts back the generators that were saved under this rank, or starts them by the rule above."""
    if rank < count_processes(folder):
        restore_random_state(folder, rank)
    else:
        seed_generators(seed, step, rank)
