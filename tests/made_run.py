"""A run small enough for a test: real tokenizer, shards and model (at width 32), and how two runs are compared."""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from safetensors.torch import load_file

from fat5.data import load_tokenizer, sample_path
from fat5.data.shards.plan import make_plan
from fat5.data.text.corpus import open_corpus
from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer
from fat5.tasks import DataConfig, ModelConfig, PretrainConfig, SourceConfig, pretrain
from fat5.train import read_rows
from fat5.train.log.metrics import TIMES
from made_corpus import write_corpus

TINY = {
    "d_model": 32,
    "d_ff": 64,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "d_kv": 16,
    "dropout_rate": 0.1,  # so that the random state matters
    "attention_dropout_rate": 0.0,  # half the time of a step at this size; the kill tests turn it on
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A prepared folder: 300 French paragraphs, a vocabulary of 1,024."""
    return prepare_sample(tmp_path_factory.mktemp("corpus"))


def prepare_sample(folder: Path) -> Path:
    """The shards of `fat5 prepare`, byte for byte, without datatrove, which a machine with a GPU may lack."""
    rows = gzip.decompress(Path(sample_path("fr")).read_bytes()).decode().splitlines(keepends=True)[:300]
    (folder / "corpus.jsonl").write_text("".join(rows))
    inputs = [str(folder / "corpus.jsonl")]
    train_tokenizer(TokenizerTraining(inputs, str(folder / "tokenizer"), vocab_size=1024))
    target = folder / "prepared"
    corpus, tokenizer = open_corpus(inputs), load_tokenizer(folder / "tokenizer")
    plan = make_plan(corpus, "", [], 0.1, tokenizer.info)
    texts = list(corpus.rows())
    each = list(zip(tokenizer.encode_each(texts), plan.held_out(texts)))
    train, validation = ([document for document, held in each if held == out] for out in (False, True))
    tokenizer.save(target / "tokenizer")
    write_corpus(target, train, 1, tokenizer.info, validation, plan.name, plan.validation_fraction)
    return target


def tiny(
    prepared: Path, output_dir: Path, *, overrides: dict | None = None, data: dict | None = None, **changes
) -> PretrainConfig:
    """A run of eight steps of about 700 tokens."""
    shapes = {"max_tokens": 64, "encoder_tokens": 256, "decoder_tokens": 128, "packs_per_step": 2, "num_workers": 0}
    settings = {"precision": "fp32", "steps": 8, "save_every": 2, "eval_every": 4, "eval_tokens": 200, "log_every": 100}
    return PretrainConfig(
        output_dir=str(output_dir),
        model=ModelConfig(preset="fat5-demo", overrides=TINY | (overrides or {})),
        data=DataConfig(sources=[SourceConfig(str(prepared))], **(shapes | (data or {}))),
        **(settings | changes),
    )


def last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name.split("-")[1]))


def rows_without_times(run: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read_rows(run / "metrics.jsonl")]


def assert_same_run(clean: Path, other: Path) -> None:
    """Weights, optimizer, random generators, data position and log: bit for bit, in everything but times."""
    assert rows_without_times(clean) == rows_without_times(other)
    ours, theirs = last_checkpoint(clean), last_checkpoint(other)
    assert ours.name == theirs.name
    for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors"):
        one, two = load_file(ours / name), load_file(theirs / name)
        assert one.keys() == two.keys()
        for key in one:
            assert torch.equal(one[key], two[key]), f"{name}: {key}"
    one, two = (json.loads((folder / "trainer.json").read_bytes()) for folder in (ours, theirs))
    assert one["data"] == two["data"]
    for key in ("step", "tokens", "raw_tokens", "encoder_tokens", "decoder_tokens", "last_evaluation"):
        assert one["progress"][key] == two["progress"][key], key
    exported, ours = (load_file(run / "model" / "model.safetensors") for run in (clean, other))
    assert all(torch.equal(exported[key], ours[key]) for key in exported)


def in_child(work: Callable[[], object], seconds: int = 120) -> int:
    """Runs `work` in a forked child, so that it can be killed without paying for the imports again.

    Returns:
        The child's exit code: 0, 1 for an exception, or minus the signal's number, SIGALRM's after `seconds`.
    """
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(seconds)
            work()
        except SystemExit as leaving:
            os._exit(int(leaving.code or 0))
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def start(config: PretrainConfig, *arguments: str, before: Sequence[str] = ()) -> subprocess.Popen:
    """Starts `fat5 pretrain` as a user does, in a process group of its own; `before` is a command that starts it."""
    recipe = Path(config.output_dir).with_suffix(".yaml")
    recipe.write_text(config.to_yaml())
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*before, sys.executable, "-m", "fat5", "pretrain", "--config", str(recipe), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


class Forked:
    """A command in a process forked from one that has imported the package; as subprocess.Popen, but for its pipes."""

    _server: TextIO | None = None

    @classmethod
    def serve(cls) -> None:
        """Forks the server. Before the first test (conftest.py): each command then begins as if there had been none."""
        ours, theirs = socket.socketpair()
        if torch.cuda.is_available():  # asking is enough: a process forked after it cannot use the GPU
            code = f"serve(socket.socket(fileno={theirs.fileno()}).makefile('rw'))"
            words = [sys.executable, "-c", f"import socket; from injected import serve; {code}"]
            own = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # asks another way
            environment = os.environ | own
            subprocess.Popen(words, env=environment, pass_fds=[theirs.fileno()], start_new_session=True)
        elif not os.fork():
            try:
                os.setsid()
                ours.close()
                from injected import serve

                serve(theirs.makefile("rw"))
            finally:
                os._exit(1)
        theirs.close()
        cls._server = ours.makefile("rw")

    def __init__(self, words: Sequence[str], fault: dict | None, variables: dict[str, str]) -> None:
        if Forked._server is None:
            Forked.serve()
        self.returncode: int | None = None
        self._folder = tempfile.TemporaryDirectory()
        request = {"words": words, "folder": self._folder.name, "fault": fault, "variables": variables}
        self.pid = self._ask(request)

    @classmethod
    def _ask(cls, request: dict) -> Any:
        assert cls._server is not None
        cls._server.write(json.dumps(request) + "\n")
        cls._server.flush()
        return json.loads(cls._server.readline())

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._ask({"poll": self.pid})
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 120.0) -> tuple[str, str]:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("fat5", timeout)
            time.sleep(0.005)
        output, error = (Path(self._folder.name, name).read_text() for name in ("stdout", "stderr"))
        return output, error


def fork(config: PretrainConfig, *arguments: str, fault: dict | None = None, **variables: str) -> Forked:
    """As `start`, without the seconds of its imports."""
    recipe = Path(config.output_dir).with_suffix(".yaml")
    recipe.write_text(config.to_yaml())
    return Forked(["pretrain", "--config", str(recipe), *arguments], fault, variables)


def command(config: PretrainConfig, *arguments: str, seconds: float = 240, **settings: Any) -> tuple[int, str]:
    """Exit code and errors of `fat5 pretrain`, started as `fork` does."""
    process = fork(config, *arguments, **settings)
    try:
        _, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode is not None
    return process.returncode, error


def wait_for_step(run: Path, step: int, seconds: float = 120.0) -> None:
    """Returns when the log of a running run has reached a step."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(row["step"] >= step for row in read_rows(run / "metrics.jsonl")):
            return
        time.sleep(0.05)
    raise AssertionError(f"{run} did not reach step {step} in {seconds} s")


def kill_at_row(row: int) -> Callable[[], None]:
    """Makes the metrics log kill the process by SIGKILL once it has written so many rows: a death at a chosen step."""
    from fat5.train.log.metrics import MetricsLog

    written = 0
    write = MetricsLog.write

    def deadly(self: MetricsLog, content: dict) -> None:
        nonlocal written
        write(self, content)
        if self.path.name == "metrics.jsonl":
            written += 1
            if written == row:
                os.kill(os.getpid(), signal.SIGKILL)

    def install() -> None:
        MetricsLog.write = deadly  # type: ignore[method-assign]

    return install


def watch_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list whose last number is the step, counted from 1, that `StepRunner.run` makes next or is making."""
    from fat5.train import trainer

    steps, rate_of = [0], trainer.learning_rate

    def watched(schedule, step, total):
        steps.append(step + 1)
        return rate_of(schedule, step, total)

    monkeypatch.setattr(trainer, "learning_rate", watched)
    return steps


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def flip(path: Path) -> None:
    """Damages a file by one bit in its middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Damages a file by its last byte."""
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    path.unlink()


__all__ = [name for name in dir() if not name.startswith("_")] + ["pretrain"]
