"""`fat5 plot RUN…`: draws a run, or compares several."""

from typing import Literal


def plot(runs: list[str] | None = None, x: Literal["step", "tokens", "hours"] = "step", output: str = "") -> None:
    """Draw the curves of one run, or compare those of several.

    Args:
        runs: folders of runs; one of several seeds stands for its runs.
        x: what to compare over: step, tokens or hours.
        output: the PNG; loss.png in the folder of a single run, comparison.png here for several.
    """
    from pathlib import Path

    from fat5.errors import ConfigurationError, DataError, check_writable
    from fat5.train import draw_comparison, draw_run
    from fat5.train.run_directory import runs_of_seeds

    if not runs:
        raise ConfigurationError("no run is given", hint="fat5 plot RUN…, with folders that hold a metrics.jsonl")
    folders = [one for run in runs for one in runs_of_seeds(Path(run)) or [Path(run)]]
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            raise DataError("holds no metrics.jsonl", where=folder, hint="Give the folder of a run")
    alone = len(folders) == 1 and x == "step"
    target = Path(output) if output else (folders[0] / "loss.png" if alone else Path("comparison.png"))
    check_writable(target)
    if alone:
        draw_run(folders[0] / "metrics.jsonl", target, folders[0].resolve().name)
    else:
        draw_comparison(folders, target, x)
    print(target)


def main(argv: list[str]) -> int:
    """Runs the verb."""
    from fat5.cli.parsing import parse

    plot(**parse(plot, argv, "plot", words="runs"))
    return 0
