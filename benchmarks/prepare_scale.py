"""Does the memory of `fat5 prepare` stay flat up to gigabytes of text, and does it survive SIGKILL at any moment?

    python benchmarks/prepare_scale.py                     # 2 GB; about 25 minutes on two free cores, 6 GB of disk
    python benchmarks/prepare_scale.py --gigabytes 0.5

The text is synthetic and always the same: words of a Zipf distribution in JSON lines and paragraphs, with lines of 1
and 2 MB. Two processes (--workers) prepare its first tenth, all of it, and all of it again while SIGKILL hits the main
process and the workers in turn at random moments; after each, the same command follows at once. The shards of the last
two must be equal byte for byte. Memory: the largest peak of a process (VmHWM), and the largest sum over all processes
at one moment (Pss, which counts shared pages once).
"""

import argparse
import filecmp
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer
from measure import row, save

FILES = 4
WORDS = 50_000
BLOCK_WORDS = 1 << 20
DOCUMENT_WORDS = 300
# Every 10 MB a line of 1 MB, every 50 MB one of 2 MB.
LONG_LINES = ((50_000_000, 2_000_000), (10_000_000, 1_000_000))
SAMPLE_SECONDS = 0.1
LETTERS = np.array(list("etaoinsrhldcumfpgwybvkéèàçùêîôœ"))


@dataclass
class Peak:
    """Peaks of one command in bytes: of its largest process, and of all together."""

    process: int = 0
    together: int = 0

    def see(self, family: set[int]) -> None:
        """Takes a sample of these processes."""
        together = 0
        for pid in family:
            try:
                self.process = max(self.process, _kilobytes(Path(f"/proc/{pid}/status"), "VmHWM:"))
                together += _kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")
            except OSError:  # it has just ended
                continue
        self.together = max(self.together, together)


def documents(seed: int) -> Iterator[str]:
    """Texts without end, always the same: words by Zipf's law, in lengths that vary widely; the first has 2 MB."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, WORDS)
    letters = LETTERS[np.minimum(rng.exponential(7, int(lengths.sum())), len(LETTERS) - 1).astype(int)]
    ends = np.cumsum(lengths)
    words = np.array(["".join(letters[end - length : end]) for end, length in zip(ends, lengths)], dtype=object)
    chances = np.cumsum(1 / np.arange(1, WORDS + 1))
    written, due = 0, {every: 0 for every, _ in LONG_LINES}
    block = np.zeros(0, dtype=object)
    while True:
        count = max(1, int(rng.lognormal(np.log(DOCUMENT_WORDS), 1)))
        for every, size in LONG_LINES:
            if written >= due[every]:
                due[every] += every
                count = size // 7
                break
        while len(block) < count:
            more = words[np.searchsorted(chances, rng.random(BLOCK_WORDS) * chances[-1])]
            block = np.concatenate([block, more])
        text, block = " ".join(block[:count].tolist()), block[count:]
        written += len(text)
        yield text


def write_corpus(folder: Path, size: int) -> None:
    """`size` bytes in four files, JSON lines and paragraphs; the files of a smaller corpus are the start of these."""
    folder.mkdir()
    for number in range(FILES):
        lines, left = number % 2 == 0, size // FILES
        with open(folder / f"{number}.{'jsonl' if lines else 'txt'}", "wb") as file:
            for text in documents(number):
                content = json.dumps({"text": text}, ensure_ascii=False) + "\n" if lines else f"{text}\n\n"
                left -= file.write(content.encode())
                if left <= 0:
                    break


def command(corpus: Path, tokenizer: Path, output: Path, workers: int) -> list[str]:
    """The command under test, as a user types it."""
    words = ["--tokenizer", str(tokenizer), "--output_dir", str(output), "--workers", str(workers)]
    return [sys.executable, "-m", "fat5", "prepare", str(corpus), *words]


def undisturbed(words: list[str]) -> Peak:
    """Runs the command to its end."""
    peak = Peak()
    code, said = _run(words, peak)
    assert code == 0, said
    return peak


def with_kills(words: list[str], kills: int, mean_seconds: float, seed: int = 0) -> tuple[Peak, dict[str, int]]:
    """Runs the command until it succeeds; SIGKILL `kills` times before, in turn to the main process and to a worker.

    The moments are uniform between 0 and twice `mean_seconds` after the first worker began. Returns the peaks and how
    often each kind was killed; fewer than `kills` if the work is done before.
    """
    chance, peak, done = random.Random(seed), Peak(), {"main": 0, "worker": 0}
    for turn in range(kills):
        kill = Kill("worker" if turn % 2 else "main", chance.uniform(0, 2 * mean_seconds), chance)
        code, said = _run(words, peak, kill)
        done[kill.kind] += kill.done
        if code == 0:
            return peak, done
        assert code == (2 if kill.kind == "worker" else -signal.SIGKILL), said
        assert kill.kind == "main" or "a worker process died" in said, said
    last = undisturbed(words)
    return Peak(max(peak.process, last.process), max(peak.together, last.together)), done


class Kill:
    """One SIGKILL to the main process or a random worker, `seconds` after the first worker began."""

    def __init__(self, kind: str, seconds: float, chance: random.Random) -> None:
        self.kind, self.seconds, self.chance = kind, seconds, chance
        self.due: float | None = None
        self.done = False

    def __call__(self, main: int) -> None:
        """Sends it if the moment has come."""
        workers = _workers(main)
        if self.due is None and workers:
            self.due = time.monotonic() + self.seconds
        victims = [main] if self.kind == "main" else workers
        if self.due is not None and not self.done and victims and time.monotonic() >= self.due:
            with suppress(ProcessLookupError):
                os.kill(self.chance.choice(victims), signal.SIGKILL)
                self.done = True


def differences(one: Path, other: Path) -> tuple[list[str], int]:
    """Files of two prepared folders, logs aside, that differ or are in one alone; and the number of those in both."""
    names = [
        {
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.is_file() and path.relative_to(folder).parts[0] != "logs"
        }
        for folder in (one, other)
    ]
    shared = sorted(names[0] & names[1])
    unequal = [name for name in shared if not filecmp.cmp(one / name, other / name, shallow=False)]
    return [*unequal, *sorted(names[0] ^ names[1])], len(shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2, help="processes of `fat5 prepare`")
    arguments = parser.parse_args()
    whole, tenth = int(arguments.gigabytes * 1e9), int(arguments.gigabytes * 1e8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "tenth", tenth)
        write_corpus(folder / "whole", whole)
        tokenizer = folder / "tokenizer"
        train_tokenizer(TokenizerTraining([str(folder / "tenth")], str(tokenizer), vocab_size=8192, rows=2000))
        small = undisturbed(command(folder / "tenth", tokenizer, folder / "small", arguments.workers))
        began = time.monotonic()
        large = undisturbed(command(folder / "whole", tokenizer, folder / "clean", arguments.workers))
        mean = (time.monotonic() - began) / (arguments.kills + 2)
        killed, kills = with_kills(
            command(folder / "whole", tokenizer, folder / "killed", arguments.workers), arguments.kills, mean
        )
        unequal, files = differences(folder / "clean", folder / "killed")
        assert not unequal, f"not equal after the kills: {unequal[:5]}"
        manifest = json.loads((folder / "clean" / "manifest.json").read_text())["splits"]
    cases = {f"{tenth / 1e9:g} GB": small, f"{whole / 1e9:g} GB": large, f"{whole / 1e9:g} GB, with SIGKILLs": killed}
    rows = []
    for case, peak in cases.items():
        rows.append(row(case, "fat5 prepare", "peak memory of a process", np.array([peak.process]), "bytes"))
        rows.append(row(case, "fat5 prepare", "peak memory of all", np.array([peak.together]), "bytes"))
    over = f"{whole / 1e9:g} GB over {tenth / 1e9:g} GB"
    ratios = {"process": large.process / small.process, "all": large.together / small.together}
    rows.append(row(over, "fat5 prepare", "peak memory of a process", np.array([ratios["process"]]), "times"))
    rows.append(row(over, "fat5 prepare", "peak memory of all", np.array([ratios["all"]]), "times"))
    case = list(cases)[-1]
    for kind, count in kills.items():
        rows.append(row(case, "fat5 prepare", f"{kind} killed", np.array([count]), "kills"))
    rows.append(row(case, "fat5 prepare", "equal files", np.array([files]), "files"))
    tokens = sum(split["tokens"] for split in manifest.values())
    rows.append(row(list(cases)[1], "fat5 prepare", "tokens", np.array([tokens]), "tokens"))
    save("prepare_scale", rows)


def _run(words: list[str], peak: Peak, kill: Kill | None = None) -> tuple[int, str]:
    """Runs the command with an eye on its memory; its exit code and the end of what it said."""
    with tempfile.TemporaryFile("w+") as log:  # not a pipe, which orphans of a killed process hold open
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak.see({process.pid, *_descendants(process.pid)})
            if kill is not None:
                kill(process.pid)
            time.sleep(SAMPLE_SECONDS)
        log.seek(0)
        return process.returncode, log.read()[-2000:]


def _workers(pid: int) -> list[int]:
    """Processes of the pool: the children of its fork server, which is a child of the main process."""
    parents = _parents()
    return sorted(worker for worker, parent in parents.items() if parents.get(parent) == pid)


def _descendants(pid: int) -> list[int]:
    parents = _parents()
    children = [one for one, parent in parents.items() if parent == pid]
    return [*children, *(one for one, parent in parents.items() if parent in children)]


def _parents() -> dict[int, int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return parents


def _kilobytes(path: Path, field: str) -> int:
    """A field of a file in /proc, in bytes; 0 if the process has none any more."""
    return next((int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(field)), 0)


if __name__ == "__main__":
    main()
