"""transformers' own suites of T5, mT5 and umT5, run on stock classes and on FAT5's: a table of what differs.

    pip download --no-binary :all: --no-deps --no-build-isolation transformers==5.23.0 && tar xzf transformers-*.tar.gz
    python scripts/stock_suites.py transformers-5.23.0 --output suites

The source distribution holds the common suite (tests/test_modeling_common.py), which runs here on tiny models of each
family; a checkout of the repository also holds the families' own files and the suite of generation, which then run too.
Needs pytest and parameterized. It writes suites.md and suites.csv; nothing of the sources is changed or kept.

Ways:
    stock      transformers as it is
    fat5       FAT5's classes under the names of the stock ones
    accelerate each stock model through fat5.accelerate when it is made
    attention  attn_implementation="fat5" wherever stock takes sdpa

The module is also the pytest plugin that makes the exchange.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

HERE = Path(__file__).parent
WAYS = ("stock", "fat5", "accelerate", "attention")
FAMILIES = ("T5", "MT5", "UMT5")
KINDS = (
    "Model", "ForConditionalGeneration", "EncoderModel", "ForSequenceClassification", "ForTokenClassification",
    "ForQuestionAnswering",
)  # fmt: skip
WAY = "FAT5_STOCK_SUITES_WAY"
# What the source distribution leaves out, and the common suite imports.
LEFT_OUT = {
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
}


# As a plugin of pytest.


def pytest_configure(config: Any) -> None:
    """Before any test is imported."""
    EXCHANGES[os.environ.get(WAY, "stock")]()


def use_fat5() -> None:
    """FAT5's classes, under the names that the suites import."""
    import transformers

    import fat5.model
    from fat5.model import FAT5Config

    def configuration(family: str) -> type:
        def initialise(self: Any, *args: Any, **options: Any) -> None:
            options = {"family": family.lower(), "head_form": "encoder-decoder"} | options
            FAT5Config.__init__(self, *args, **options)

        return type(f"{family}Config", (FAT5Config,), {"__init__": initialise, "__module__": __name__})

    exchanged: list[tuple[str, str, type]] = []
    for family in FAMILIES:
        home = getattr(transformers, f"{family}Model").__module__
        mine = {f"{family}Config": configuration(family)}
        for kind in KINDS:
            name = f"{family}{kind}"
            if hasattr(sys.modules[home], name):
                mine[name] = type(name, (getattr(fat5.model, f"FAT5{kind}"),), {"__module__": home})
        exchanged += [(place, name, cls) for name, cls in mine.items() for place in ("transformers", home)]
    # By name: while it is imported, transformers puts another module in its own place.
    for place, name, cls in exchanged:
        setattr(sys.modules[place], name, cls)


def use_accelerate() -> None:
    """Each stock model is accelerated when it is made."""
    for stock, kinds in _stock_bases():
        made = stock.post_init

        def post_init(self: Any, made: Any = made, kinds: Any = kinds) -> None:
            import fat5

            made(self)
            if type(self).__name__ in kinds:
                fat5.accelerate(self)

        stock.post_init = post_init


def use_attention() -> None:
    """attn_implementation="fat5" for None and "sdpa"."""
    import fat5  # noqa: F401  (registers it)

    for stock, _ in _stock_bases():
        chosen = stock.get_correct_attn_implementation

        def choose(self: Any, requested: str | None, is_init_check: bool = False, chosen: Any = chosen) -> Any:
            return "fat5" if requested in (None, "sdpa") else chosen(self, requested, is_init_check)

        stock.get_correct_attn_implementation = choose


def _stock_bases() -> list[tuple[Any, set[str]]]:
    """The base class of each family's models, and the names of those models."""
    import transformers

    modules = {family: sys.modules[getattr(transformers, f"{family}Model").__module__] for family in FAMILIES}
    return [
        (getattr(module, f"{family}PreTrainedModel"), {family + kind for kind in KINDS})
        for family, module in modules.items()
    ]


EXCHANGES = {"stock": lambda: None, "fat5": use_fat5, "accelerate": use_accelerate, "attention": use_attention}


# As a command.


def main(arguments: list[str] | None = None) -> int:
    """Runs the suites each way, and writes the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="the folder of transformers' sources: it holds tests/")
    parser.add_argument("--output", type=Path, default=Path("suites"), help="folder of suites.md and suites.csv")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="stock is always among them")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--select", default="", help="an expression of pytest's -k")
    parser.add_argument("--python", default=sys.executable, help="interpreter with fat5, pytest and parameterized")
    options = parser.parse_args(arguments)
    try:
        outcomes = run_suites(options)
    except SuitesError as error:
        print(f"stock_suites: {error}", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    write_csv(outcomes, options.output / "suites.csv")
    (options.output / "suites.md").write_text(report(outcomes), encoding="utf-8")
    print(report(outcomes))
    return 0


class SuitesError(Exception):
    """Why the suites cannot run, in one line."""


# way -> test -> (outcome, reason)
Outcomes = dict[str, dict[str, tuple[str, str]]]


def run_suites(options: argparse.Namespace) -> Outcomes:
    if not (options.sources / "tests" / "test_modeling_common.py").is_file():
        raise SuitesError(f"{options.sources}: no tests/test_modeling_common.py; give the sources of transformers")
    probe = subprocess.run(
        [options.python, "-c", "import fat5, parameterized, pytest, transformers"], capture_output=True, text=True
    )
    if probe.returncode:
        raise SuitesError(f"{options.python}: {probe.stderr.strip().splitlines()[-1]}; install it there")
    with tempfile.TemporaryDirectory() as folder:
        files = lay_out(options.sources.resolve(), Path(folder), options.families)
        ways = [way for way in WAYS if way == "stock" or way in options.ways]
        return {way: run_one(way, Path(folder), files, options) for way in ways}


def lay_out(sources: Path, folder: Path, families: list[str]) -> list[str]:
    """Links the sources' tests into `folder`, with our subjects and what the distribution leaves out; returns the files
    to run.
    """
    tests = folder / "tests"
    tests.mkdir()
    for entry in (sources / "tests").iterdir():
        (tests / entry.name).symlink_to(entry)
    if (sources / "conftest.py").is_file():
        (folder / "conftest.py").symlink_to(sources / "conftest.py")
    (tests / "__init__.py").touch()
    for name, text in LEFT_OUT.items():
        path = tests / name
        if not path.parent.exists():
            path.parent.mkdir()
            (path.parent / "__init__.py").touch()
            path.write_text(text, encoding="utf-8")
    shutil.copy(HERE / "stock_suites_subjects.py", tests / "test_subjects.py")
    ours = [f"tests/test_subjects.py::{family}{side}Test" for family in families for side in ("Model", "Encoder")]
    theirs = [f"tests/models/{family.lower()}/test_modeling_{family.lower()}.py" for family in families]
    return ours + [name for name in theirs if (folder / name).is_file()]


def run_one(way: str, folder: Path, files: list[str], options: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Outcome and reason of each test, run one way in a process of its own."""
    written = folder / f"{way}.xml"
    paths = [str(HERE), str(folder), os.environ.get("PYTHONPATH", "")]
    command = [options.python, "-m", "pytest", "-q", "-p", "stock_suites", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, f"--junitxml={written}", *(["-k", options.select] if options.select else []), *files],
        cwd=folder,
        env=os.environ | {WAY: way, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if run.returncode not in (0, 1) or not written.is_file():
        lines = (run.stdout + run.stderr).strip().splitlines() or ["nothing was printed"]
        raise SuitesError(f"pytest ended with exit code {run.returncode} on the way {way!r}: {lines[-1].strip()}")
    return read_outcomes(written)


def read_outcomes(path: Path) -> dict[str, tuple[str, str]]:
    """From pytest's XML; of several entries of one test, as subtests make them, the worst counts."""
    rank = ["skipped", "passed", "failed"]
    found: dict[str, tuple[str, str]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name', '')}"
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                lines = (child.get("message") or child.text or "").strip().splitlines()
                reason = lines[0] if lines else ""
        if name not in found or rank.index(outcome) > rank.index(found[name][0]):
            found[name] = (outcome, reason)
    return found


def report(outcomes: Outcomes) -> str:
    """Counts of each way, of all tests and of those that stock passes; then each test that is not as with stock."""
    stock = outcomes["stock"]
    passing = [name for name, (outcome, _) in stock.items() if outcome == "passed"]
    lines = [
        f"| way | passed | failed | skipped | of the {len(passing)} that stock passes: passed | failed | skipped |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, tests in outcomes.items():
        everything = Counter(outcome for outcome, _ in tests.values())
        among = Counter(tests[name][0] for name in passing if name in tests)
        lines.append(f"| {way} | {_counts(everything)} | {_counts(among)} |")
    rows = [
        (way, name, *tests.get(name, ("missing", "")))
        for way, tests in outcomes.items()
        for name, expected in stock.items()
        if tests.get(name, ("missing", ""))[0] != expected[0]
    ]
    if rows:
        lines += ["", "| way | test | outcome | reason |", "|---|---|---|---|"]
        lines += [f"| {way} | {name} | {outcome} | {_cell(reason)} |" for way, name, outcome, reason in rows]
    return "\n".join(lines) + "\n"


def write_csv(outcomes: Outcomes, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["way", "test", "outcome", "reason"])
        writer.writerows((way, name, *found) for way, tests in outcomes.items() for name, found in tests.items())


def _counts(counted: Counter[str]) -> str:
    return " | ".join(str(counted[outcome]) for outcome in ("passed", "failed", "skipped"))


def _cell(text: str) -> str:
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= 160 else text[:157] + "..."


if __name__ == "__main__":
    sys.exit(main())
