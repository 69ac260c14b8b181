"""Does `fat5 prepare` keep up with the tokenizer it is built on, and does its memory stay flat?

    python benchmarks/prepare.py

Speed: the same documents, cores and tokenizer, in turn: bare `tokenizers` (`encode_batch` over all cores, ids made
into one NumPy array, texts already in memory) against all of `fat5 prepare` (reading JSON lines, hashing, splitting,
writing, fsync, manifest; a new process each time, its start included). Memory: the peak of the processes of one
preparation at 10 MB and at 100 MB of text.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fat5.data import load_tokenizer, open_shards, sample_path
from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer
from measure import interleaved, row, save

PREPARE = """
import sys
from fat5.data.shards.prepare import PrepareConfig, prepare
prepare(PrepareConfig([sys.argv[1]], sys.argv[2], sys.argv[3], validation_fraction=0.01, workers=int(sys.argv[4])))
"""


def write_corpus(path: Path, megabytes: float) -> list[str]:
    """JSON lines of the French sample, over and over, each time with another number so that no cache knows them all."""
    with gzip.open(sample_path("fr"), "rt", encoding="utf-8") as file:
        sample = [json.loads(line)["text"] for line in file]
    texts: list[str] = []
    size = turn = 0
    while size < megabytes * 1e6:
        for text in sample:
            texts.append(f"{turn}. {text}")
            size += len(texts[-1].encode("utf-8"))
        turn += 1
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return texts


def peak_memory(process: subprocess.Popen) -> float:
    """Waits for a process; returns the largest peak (VmHWM) of it and its descendants, in bytes.

    Not `ru_maxrss`, which a child inherits from the process that forked it.
    """
    peak = 0
    while process.poll() is None:
        parents: dict[int, int] = {}
        peaks: dict[int, int] = {}
        for path in Path("/proc").glob("[0-9]*/status"):
            try:
                fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
            except OSError:
                continue
            parents[int(fields["Pid"])] = int(fields["PPid"])
            peaks[int(fields["Pid"])] = int(fields.get("VmHWM", "0 kB").split()[0]) * 1024
        family = {process.pid}
        for _ in range(4):
            family |= {pid for pid, parent in parents.items() if parent in family}
        peak = max([peak, *(peaks.get(pid, 0) for pid in family)])
        time.sleep(0.1)
    assert process.returncode == 0, "fat5 prepare failed"
    return float(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20, help="text for the speed comparison")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocab_size", type=int, default=8192)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(
            TokenizerTraining([str(sample_path("fr"))], str(folder / "tokenizer"), vocab_size=arguments.vocab_size)
        )
        tokenizer = load_tokenizer(folder / "tokenizer")
        corpus = folder / "corpus.jsonl"
        texts = write_corpus(corpus, arguments.megabytes)

        def bare(method: str) -> int:
            encode = getattr(tokenizer.backend, method)
            total = 0
            for start in range(0, len(texts), 8192):
                total += sum(map(len, encode(texts[start : start + 8192], add_special_tokens=False)))
            return total

        def run(path: Path) -> float:
            shutil.rmtree(folder / "out", ignore_errors=True)
            command = [sys.executable, "-c", PREPARE, str(path), f"{folder}/tokenizer", f"{folder}/out", str(cores)]
            return peak_memory(subprocess.Popen(command))

        providers = {
            "tokenizers encode_batch": lambda: bare("encode_batch"),
            "tokenizers encode_batch_fast": lambda: bare("encode_batch_fast"),
            "fat5 prepare": lambda: run(corpus),
        }
        seconds = interleaved(providers, arguments.repeats)
        total = bare("encode_batch")
        made = sum(open_shards(folder / "out", split).num_tokens for split in ("train", "validation"))
        assert made == total, f"fat5 prepare wrote {made} tokens, tokenizers gives {total}"
        case = f"{arguments.megabytes:g} MB French, {cores} cores"
        rows = [row(case, name, "throughput", total / taken, "tokens/s") for name, taken in seconds.items()]
        for name in list(providers)[:2]:
            ratio = seconds[name] / seconds["fat5 prepare"]
            rows.append(row(case, "fat5 prepare", f"over {name.split()[1]}", ratio, "ratio"))
        for megabytes in (10, 100):
            write_corpus(corpus, megabytes)
            peaks = np.array([run(corpus) for _ in range(3)])
            rows.append(row(f"{megabytes} MB French, {cores} cores", "fat5 prepare", "peak memory", peaks, "bytes"))
        save("prepare", rows)


if __name__ == "__main__":
    main()
