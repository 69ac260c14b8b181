"""The keys of `fat5 tokenizer` and `fat5 prepare`; imports no numpy, so that --help answers at once."""

from dataclasses import dataclass, field
from typing import Literal

from fat5.data.text.rows import CorpusOptions


@dataclass
class TokenizerTraining:
    """Trains a tokenizer on your text and saves a folder that stock `AutoTokenizer` loads.

    Args:
        inputs: files and folders (.txt .jsonl .json .csv, also .gz .zst .bz2 .xz; .parquet), sample:fr, or one dataset
            of the hub.
        output_dir: folder to write; new or empty.
        model: `bpe` or `unigram`, both with byte fallback.
        vocab_size: number of ids, special tokens included; a multiple of 128, at most 65,536.
        rows: learn from the first documents, this many at most.
        normalization: `none` keeps every text as it is; `nfc` composes accents first (not byte-exact then).
        corpus: how to read the inputs.
    """

    inputs: list[str]
    output_dir: str
    model: Literal["bpe", "unigram"] = "bpe"
    vocab_size: int = 32_768
    rows: int = 1_000_000
    normalization: Literal["none", "nfc"] = "none"
    corpus: CorpusOptions = field(default_factory=CorpusOptions)


@dataclass
class SlurmOptions:
    """How to ask Slurm for tasks.

    Args:
        partition: partition to submit to.
        time: time limit of one task.
        qos: quality of service.
        memory_gb: memory of one task.
        max_array_size: the cluster's limit on the size of a job array.
        environment: shell command that activates the Python environment, if the submitting one is not inherited.
    """

    partition: str = ""
    time: str = "24:00:00"
    qos: str = "normal"
    memory_gb: int = 4
    max_array_size: int = 1001
    environment: str = ""


@dataclass
class PrepareConfig:
    """Turns text into token shards for `fat5 pretrain`. Run again, it continues where it stopped.

    Args:
        inputs: files and folders (.txt .jsonl .json .csv, also .gz .zst .bz2 .xz; .parquet), sample:fr, or one dataset
            of the hub.
        tokenizer: folder of a tokenizer (from `fat5 tokenizer`, or T5, mT5, ByT5, …), or its name on the hub.
        output_dir: folder to write; new, empty, or begun by the same command.
        name: name of the corpus in the manifest; the name of its first file by default.
        validation_fraction: share of the documents to hold out, chosen by a hash of their text.
        steps: cleaning steps in order: language=fr, c4, gopher_quality, gopher_repetition, urls, pii, minhash.
        workers: tasks to run at once; 0 means one per core (local) or no limit (slurm).
        executor: where the tasks run.
        slurm: how to ask Slurm, with `--executor slurm`.
        corpus: how to read the inputs.
        verify: only check every shard in `output_dir` against its SHA-256.
    """

    inputs: list[str] = field(default_factory=list)
    tokenizer: str = ""
    output_dir: str = ""
    name: str = ""
    validation_fraction: float = 0.01
    steps: list[str] = field(default_factory=list)
    workers: int = 0
    executor: Literal["local", "slurm", "ray"] = "local"
    slurm: SlurmOptions = field(default_factory=SlurmOptions)
    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    verify: bool = False
