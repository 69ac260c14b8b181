"""`fat5 VERB …`: finds the verb's file and runs it. Imports nothing heavy, so `fat5 --help` answers at once."""

import errno
import os
import sys
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from io import TextIOWrapper
from signal import SIGINT

VERBS = {
    "demo": "the whole chain on the French sample: tokenizer, shards, pretraining, plot, samples",
    "init": "write a commented recipe for a language, a size and a device",
    "tokenizer": "train a tokenizer on your text",
    "prepare": "turn text into verified token shards",
    "pretrain": "pretrain an encoder-decoder on token shards with the UL2 mixture",
    "finetune": "teach a model a task: translation, summarisation, classification, tagging, answers",
    "evaluate": "scores of a model on a task, or its loss by denoiser",
    "generate": "infill, continue or transform text with a model",
    "convert": "to stock transformers, CTranslate2 or ONNX, with proof that the copy computes the same",
    "plot": "draw and compare runs",
    "audit": "show what the model sees: examples, lengths, rates, fill",
    "bench": "compile every kernel configuration for every architecture, or tune them on this GPU",
    "completion": "completion of verbs, keys and values by the Tab key, for bash, zsh or fish",
    "doctor": "check this machine and a configuration; print the memory plan",
}


UNDER_TORCHRUN = ("pretrain", "finetune")

LISTENING_SECONDS = 1.0


def usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {what}" for verb, what in VERBS.items())
    return (
        "usage: fat5 VERB [--config RECIPE] [--key value …]\n\n"
        "Pretrain, run and convert T5-family encoder-decoder models.\n\n"
        f"verbs:\n{verbs}\n\n"
        "`fat5 VERB --help` lists every key of a verb. Start with `fat5 demo --output_dir demo`."
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0 done, 2 something the user can mend, 128 and a signal's number."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, TextIOWrapper):
        # A letter that the terminal cannot show is printed as its code, without a traceback.
        sys.stdout.reconfigure(errors="backslashreplace")
    if not _streams_are_open():
        print("fat5: standard output is closed. Redirect it to a file or to /dev/null", file=sys.stderr)
        return 2
    code = 0
    try:
        code = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()  # the reader closed the pipe, as `| head` does
        return 0
    except OSError as error:
        _silence_stdout()
        if code == 0:
            print(f"fat5: standard output: {_describe(error)}", file=sys.stderr)
        return code or 2
    return code


def _streams_are_open() -> bool:
    """Whether standard output is open. A closed stream becomes /dev/null; otherwise the next file opened would get its
    number, and receive what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (as long as the process)
    return sys.stdout is not None


def _stdout_works() -> bool:
    try:
        sys.stdout.flush()
    except OSError:
        return False
    return True


def _silence_stdout() -> None:
    """Keeps the interpreter's own flush at exit from complaining."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _describe(error: OSError) -> str:
    """What failed, and what to do."""
    remedies = {
        errno.ENOSPC: "Make room, and run the same command again",
        errno.EDQUOT: "Make room, and run the same command again",
        errno.EFBIG: "Raise the limit on the size of a file (ulimit -f)",
        errno.EMFILE: "Raise the limit on open files (ulimit -n)",
        errno.EIO: "The disk fails; the system log (dmesg) has details",
        errno.EROFS: "Choose a folder that can be written",
        errno.EACCES: "Choose a folder that can be written, or change its permissions",
    }
    where = f"{error.filename}: " if error.filename else ""
    remedy = f". {remedies[error.errno]}" if error.errno in remedies else ""
    return " ".join(f"{where}{error.strerror or error}{remedy}".splitlines())


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"fat5 {version('fat5')}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(verb, VERBS, n=1)
        meant = f"Did you mean `fat5 {near[0]}`?" if near else "`fat5 --help` lists the verbs."
        print(f"fat5: no verb {verb!r}. {meant}", file=sys.stderr)
        return 2
    for word in rest:
        # Bytes that are not UTF-8 reach Python as lone surrogates, which JSON, YAML and tokenizers refuse.
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            print(f"fat5 {verb}: {word!r}: not UTF-8. Rename it, or set a UTF-8 locale", file=sys.stderr)
            return 2
    from fat5.errors import FAT5Error
    from fat5.launch import is_main, refuse_many_processes

    # Waiting OpenMP threads spin by default, and starve each other on a busy machine; a short spin costs nothing on an
    # idle one (docs/lab-log.md). This must be set before torch loads OpenMP.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        if verb not in UNDER_TORCHRUN and "LOCAL_RANK" in os.environ:
            refuse_many_processes(verb)
        return import_module(f"fat5.cli.{verb}").main(rest) or 0
    except FAT5Error as error:
        _tell(verb, error)
        return 2
    except KeyboardInterrupt as interruption:
        # A RunStopped has the signal that stopped a run after its state was saved.
        signum = getattr(interruption, "signal", None) if verb in UNDER_TORCHRUN else None
        if signum is None or is_main():
            print(f"fat5 {verb}: {interruption if signum else 'interrupted'}", file=sys.stderr)
        return 128 + (signum or SIGINT)
    except BrokenPipeError:
        raise
    except OSError as error:
        # The user can mend a full disk or a folder without permission, like any other bad input.
        if error.filename is None and not _stdout_works():
            error.filename = "standard output"
        print(f"fat5 {verb}: {_describe(error)}", file=sys.stderr)
        return 2


def _tell(verb: str, error: Exception) -> None:
    """Prints an error as one line. Of many processes, the first speaks; another one only about what is its own.

    A fault that all have, such as a wrong key, ends the first process at once, and the launcher then ends the others
    while they wait here.
    """
    from fat5.launch import is_main

    who = f"fat5 {verb}"
    if not is_main():
        import time

        time.sleep(LISTENING_SECONDS)
        who += f", rank {os.environ.get('RANK')}"
    print(f"{who}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
