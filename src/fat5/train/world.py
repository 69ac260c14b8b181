"""The processes that train together: who this one is, and what they tell each other. Alone, nothing is exchanged.

Numbers of a step travel between GPUs by NCCL; the host's decisions, and everything on a CPU, travel by Gloo, so that no
decision waits for a GPU.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fat5.errors import ConfigurationError, FAT5Error
from fat5.files import parse_json
from fat5.launch import Launch
from fat5.machine import free_memory
from fat5.train.signals import RunStopped

T = TypeVar("T")

SILENCE = timedelta(minutes=10)
"""A process that the others have waited for this long, in a step, hangs: they give up."""

PATIENCE = timedelta(hours=24)
"""The same while the main process predicts, exports or writes its last checkpoint."""


ENDING_SECONDS = 15
"""After an error a process that has not ended by itself is ended by SIGALRM."""

POLL_SECONDS = 0.02


class LostProcessError(FAT5Error):
    """Another process of the run has died or hangs."""


def training_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class World:
    """This process among those of a run. Every operation must be called by all of them, in the same order.

    Raises (every operation):
        LostProcessError: another process has ended, or did not answer in time.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    patient: Any = None
    """The group that waits for the main process as long as it takes; None for the default group"""
    launch: Launch | None = None
    """This process among the nodes' others; None for what the environment says"""

    @classmethod
    @contextmanager
    def here(cls) -> Iterator["World"]:
        """The world that torchrun started this process in, or this process alone.

        A context manager: the processes meet on entering. On leaving they wait for each other, unless one failed.

        Raises:
            ConfigurationError: the environment of a launcher is incomplete, or has more processes than GPUs.
        """
        launch = Launch.here()
        if launch.size == 1:
            yield cls(training_device())
            return
        device = _own_device(launch)
        with together():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            store = _meet(launch)
            dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=SILENCE)
            patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        world = cls(device, launch.rank, launch.size, patient)
        try:
            yield world
        except RunStopped:
            world._leave()
            raise
        except BaseException as error:
            # The others are gone, or wait in vain. A GPU that waits for one of them must not keep this process alive.
            signal.alarm(ENDING_SECONDS)
            if is_of_connection(error):  # FSDP2 talks to the others in the middle of a forward or backward pass
                raise lost_process(error) from error
            raise
        world._leave()

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files and speaks to the user."""
        return self.rank == 0

    def free_memory(self) -> int | None:
        """Bytes that this process can still allocate on its device; None if the system does not say."""
        return free_memory(self.device)

    def alone(self) -> "World":
        """The world of this process while it does something that the others do not take part in."""
        return World(self.device)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            with together():
                dist.all_reduce(tensor)
        return tensor

    def all_any(self, flag: Tensor) -> Tensor:
        """True where the flag of any process is; a bool tensor, which stays on its device."""
        return flag if self.size == 1 else self.all_sum(flag.int()) > 0

    def are_equal(self, tensor: Tensor, group: Any = None) -> bool:
        """Whether every process (of a group) has the same integers."""
        if self.size == 1:
            return True
        low, high = tensor.clone(), tensor.clone()
        with together():
            dist.all_reduce(low, dist.ReduceOp.MIN, group)
            dist.all_reduce(high, dist.ReduceOp.MAX, group)
        return torch.equal(low, high)

    def share(self, tensor: Tensor) -> None:
        """Gives a tensor of the main process to all, in place."""
        if self.size > 1:
            with together():
                dist.broadcast(tensor, 0)

    def agree(self, value: T | None) -> T | None:
        """The value of the lowest rank that has one; None if none has. For the host's decisions."""
        if self.size == 1:
            return value
        if not self.all_sum(torch.tensor(int(value is not None))):
            return None
        return next((one for one in self.gather(value) if one is not None), None)

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank; JSON."""
        return [value] if self.size == 1 else self._exchange(value, None)

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """The bytes of every process, by rank."""
        return [content] if self.size == 1 else self._exchange_bytes(content, None)

    def broadcast(self, value: T) -> T:
        """The main process's value, however long it works on it; JSON."""
        if self.size == 1:
            return value
        main: T = self._exchange(value, self.patient)[0]
        return main

    def _exchange(self, value: Any, group: Any) -> list[Any]:
        """The value of every process, by rank. It travels as JSON: nothing that arrives is unpickled."""
        return [parse_json(text) for text in self._exchange_bytes(json.dumps(value).encode(), group)]

    def _exchange_bytes(self, content: bytes, group: Any) -> list[bytes]:
        text = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with together():
            dist.all_gather(lengths, torch.tensor([text.numel()]), group)
            longest = int(max(lengths))
            texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(texts, nn.functional.pad(text, (0, longest - text.numel())), group)
        return [one[: int(length)].numpy().tobytes() for one, length in zip(texts, lengths, strict=True)]

    def _leave(self) -> None:
        """Returns when every process is here: the first to end would have the launcher end the others."""
        self.broadcast(None)
        dist.destroy_process_group()


def _meet(launch: Launch) -> "dist.Store":
    """A store of the processes that run now.

    torchrun keeps one store for a job, in which a restart would find the addresses of the processes before it. So each
    process leaves a word of its own, and goes by the answer of the first process that repeats it.
    """
    from torch.distributed.rendezvous import rendezvous  # a PyTorch without torch.distributed has no such module

    shared, _, _ = next(rendezvous("env://", timeout=SILENCE))
    word = uuid4().hex
    shared.set(f"fat5/word/{launch.rank}", word)
    deadline = time.monotonic() + SILENCE.total_seconds()
    while time.monotonic() < deadline:
        if launch.rank == 0:
            words = [shared.get(f"fat5/word/{rank}").decode() for rank in range(launch.size)]
            shared.set("fat5/answer", " ".join(words))
        answer = shared.get("fat5/answer").decode().split()
        if word in answer:
            first = answer[0]
            shared.set(f"fat5/taken/{launch.rank}", first)
            others = range(launch.size) if launch.rank == 0 else ()
            if all(shared.get(f"fat5/taken/{rank}").decode() == first for rank in others):
                return dist.PrefixStore(f"fat5/{first}", shared)
        time.sleep(POLL_SECONDS)
    raise RuntimeError("the processes did not meet")


def _own_device(launch: Launch) -> torch.device:
    """The GPU of this process's number on its node, made the current one; the CPU where there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if launch.local_size > count:
        raise ConfigurationError(
            f"{launch.local_size} processes were started on a node with {count} GPU{'s' * (count > 1)}",
            hint=f"Start one for each GPU: torchrun --nproc-per-node {count} …",
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


@contextmanager
def together() -> Iterator[None]:
    """Around an operation of all processes: where another one is missing, says so."""
    try:
        yield
    except RuntimeError as error:
        raise lost_process(error) from error


def lost_process(error: BaseException) -> LostProcessError:
    """What a failed operation of all processes means for the user."""
    reason = str(error).strip().splitlines()[0].split(". ")[0][:200] if str(error) else type(error).__name__
    return LostProcessError(
        f"another process of this run has ended, or has not answered in time ({reason})",
        hint="Its own message says why; the same command continues from the last checkpoint",
    )


def is_of_connection(error: BaseException) -> bool:
    """Whether an error comes from NCCL's or Gloo's connections, not from a computation."""
    if isinstance(error, LostProcessError) or not isinstance(error, RuntimeError):
        return False
    words = ("gloo", "nccl", "connection closed", "connection reset")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
