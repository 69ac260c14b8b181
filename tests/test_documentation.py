"""Every command and snippet of the README and the pages is run here, at reduced size, or at least parsed.

The pages of tokenizer, prepare, ul2, packing, model and attention are run by their rooms' own page tests.
"""

import gzip
import json
import re
import shlex
import subprocess
import tomllib
from html import escape
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from fat5.cli import parsing
from fat5.cli.main import VERBS, main
from fat5.data import sample_path
from made_packages import deb, sample, tar
from made_shell import fat5_on_path

ROOT = Path(__file__).parents[1]
# In the order in which a reader meets them: later pages use what earlier ones made.
PAGES = [
    "README.md",
    "docs/demo.md",
    "docs/finetuning.md",
    "docs/generate.md",
    "docs/convert.md",
    "docs/compatibility.md",
    "docs/init.md",
    "docs/completion.md",
    "docs/doctor.md",
    "docs/your-language.md",
    "docs/continued-pretraining.md",
    "docs/training.md",
    "docs/many-devices.md",
    "docs/checkpoints.md",
    "docs/reliability.md",
    "docs/optimizers.md",
    "docs/audit.md",
    "docs/french-tasks.md",
    "docs/french.md",
]
# Their commands use what their snippets make, and the other way round.
IN_ORDER = {"docs/continued-pretraining.md", "docs/your-language.md"}
# The corpus of your-language.md: packages of the real layout, made here in place of the download.
BOOKS = ("debian-faq-de", "debian-handbook", "debian-reference-de", "developers-reference-de", "maint-guide-de")
TINY = "{d_model: 32, d_ff: 64, num_layers: 1, num_decoder_layers: 1, num_heads: 2, d_kv: 16}"
PRETRAIN = {
    "model.preset": "fat5-demo",
    "model.overrides": TINY,
    "data.max_tokens": "64",
    "data.encoder_tokens": "512",
    "data.decoder_tokens": "384",
    "data.packs_per_step": "1",
    "data.num_workers": "0",
    "schedule.warmup_steps": "1",
    "steps": "2",
    "eval_tokens": "256",
}
# What makes each verb small enough for a test. The command itself stays as it is written.
SMALLER = {
    "tokenizer": {"vocab_size": "1024", "rows": "300"},
    "pretrain": PRETRAIN,
    "prepare": {"workers": "1"},
    "demo": {"tokenizer.vocab_size": "1024", "prepare.workers": "1"}
    | {f"pretrain.{key}": value for key, value in PRETRAIN.items()},
    "finetune": {"steps": "2", "data.max_examples": "400", "data.max_source_tokens": "64", "max_new_tokens": "3"},
    "audit": {"examples": "200", "tokens": "20000"},
    "generate": {"max_new_tokens": "3"},
}
# Needs the hub or a cluster: only parsed.
ELSEWHERE = re.compile(r"--config fr/|--executor (slurm|ray)|torchrun|runs/(base|large)\b|(data|runs)/packages")


def blocks(page: str) -> list[tuple[str, str]]:
    return re.findall(r"```(bash|python)\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def lines_of(block: str) -> list[str]:
    lines = [line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def commands(page: str) -> list[str]:
    return [line for language, block in blocks(page) if language == "bash" for line in lines_of(block)]


def snippets(page: str) -> list[str]:
    return [block for language, block in blocks(page) if language == "python"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the reader has it: nothing but a text and examples of their own."""
    folder = tmp_path_factory.mktemp("desk")
    rows = gzip.decompress(Path(sample_path("fr")).read_bytes()).decode().splitlines(keepends=True)[:300]
    (folder / "my_text.jsonl").write_text("".join(rows), encoding="utf-8")
    pairs = [json.dumps({"source": f"le nombre {n}", "target": f"the number {n}"}) for n in range(60)]
    (folder / "my_pairs.jsonl").write_text("\n".join(pairs), encoding="utf-8")
    (folder / "packages").mkdir()
    german = list(sample("de").values())
    for number, book in enumerate(BOOKS):
        pages = {}
        for page in range(12):
            texts = german[120 * number + 10 * page :][:10]
            html = "".join(f"<p>{escape(text)}</p>" for text in texts)
            pages[f"./usr/share/doc/{book}/html/de-DE/page-{page}.html"] = f"<html><body>{html}</body></html>".encode()
        deb(folder / "packages", book, tar(pages))
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    if page != "README.md":  # drawings and the measured peak of the machine have tests of their own
        monkeypatch.setattr("fat5.train.run.draw_run", lambda *arguments: None)
        monkeypatch.setattr("fat5.train.trainer.peak_flops", lambda *arguments: 1e12)
    for language, block in blocks(page):
        if language == "python":
            if page in IN_ORDER:
                exec(compile(block, page, "exec"), {})
            continue
        for line in lines_of(block):
            run_line(page, line, monkeypatch)


def run_line(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if line.startswith("fat5 "):
        words = shlex.split(line)[1:]
        assert words[0] in VERBS, line
        if (ELSEWHERE.search(line) and words[0] != "doctor") or "--help" in words:
            assert_parses(words, monkeypatch)
        else:
            code = main([words[0], *words[1:], *smaller(words)])
            # The doctor of a recipe whose data is elsewhere says so with 2.
            assert code == 0 or (code == 2 and words[0] == "doctor"), f"{page}: {line}: exit code {code}"
    elif line.startswith("torchrun "):  # tests/train/test_many_devices.py and others start it
        words = shlex.split(line)
        assert_parses(words[words.index("fat5") + 1 :], monkeypatch)
    elif line.startswith("make "):
        target = line.split()[1]
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), line
    elif line.startswith("python scripts/french_corpus.py") and all(book in line for book in BOOKS):
        monkeypatch.syspath_prepend(str(ROOT / "scripts"))
        corpus = import_module("french_corpus")
        assert corpus.main([word for word in shlex.split(line)[2:] if word != "--download"]) == 0
    elif " | fat5 " in line:
        shell = ["bash", "-o", "pipefail", "-c", f"{line} --max_new_tokens 3"]
        with fat5_on_path() as environment:
            assert subprocess.run(shell, env=environment, check=False).returncode == 0, line
    else:
        assert_run_elsewhere(page, shlex.split(line))


def assert_run_elsewhere(page: str, words: list[str]) -> None:
    """A command that takes too long here, or the network: what it names must exist, and a test must run it."""
    if words[:2] == ["python", "-m"]:
        assert find_spec(words[2]), f"{page}: no module {words[2]}"
    elif words[0] == "python":
        script = ROOT / words[1]
        source = script.read_text(encoding="utf-8")
        for flag in (word for word in words if word.startswith("--")):
            assert f'"{flag}"' in source, f"{page}: {words[1]} has no {flag}"
        callers = [test for test in (ROOT / "tests").rglob("*.py") if script.stem in test.read_text(encoding="utf-8")]
        assert callers, f"{page}: no test runs {words[1]}"
    elif words[0] == "pytest":
        for path in (word for word in words[1:] if word.startswith("tests")):
            assert (ROOT / path).exists(), f"{page}: {path} is not there"
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra in re.findall(r"fat5\[([\w,]+)\]", " ".join(words)):
            assert set(extra.split(",")) <= set(extras), f"{page}: no extra {extra}"
    else:
        assert words[:2] == ["pip", "download"], f"{page}: nobody runs {' '.join(words)!r}"


def test_commands_within_sentences_exist(capsys: pytest.CaptureFixture[str]) -> None:
    helps: dict[str, str] = {}
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for line in re.findall(r"`((?:fat5|pytest|python|make) [^`\n]+)`", path.read_text(encoding="utf-8")):
            if path.name == "lab-log.md" or path.name == "performance.md":  # what was run on its day
                continue
            words = line.split()
            if words[0] == "make":
                assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), f"{path.name}: {line}"
            elif words[0] == "fat5" and words[1] != "VERB":
                assert words[1].rstrip(":,") in VERBS, f"{path.name}: {line}"
                for flag in re.findall(r"--[\w.]+", line):
                    if words[1] not in helps:
                        with pytest.raises(SystemExit):
                            main([words[1], "--help"])
                        helps[words[1]] = capsys.readouterr().out
                    assert f"{flag} " in helps[words[1]] or f"{flag}\n" in helps[words[1]], f"{path.name}: {line}"
            elif words[0] == "pytest":
                for test in (word for word in words if word.startswith("tests")):
                    assert (ROOT / test).exists(), f"{path.name}: {line}"
            elif words[0] == "python" and words[1].endswith(".py"):
                assert (ROOT / words[1]).exists(), f"{path.name}: {line}"


def test_every_page_is_run() -> None:
    """A page with commands is among those above, or its room's own test names it."""
    rooms = ("tests/data/test_data_pages.py", "tests/data/test_docs.py", "tests/model/test_model_pages.py")
    rooms += ("tests/tasks/test_metrics.py", "tests/data/test_collator_with_trainer.py")
    others = "".join((ROOT / path).read_text(encoding="utf-8") for path in rooms)
    for path in (ROOT / "docs").glob("*.md"):
        if re.search(r"```(bash|python)", path.read_text(encoding="utf-8")) and f"docs/{path.name}" not in PAGES:
            named = f'"{path.name}"' in others or f'"{path.stem}"' in others
            assert named, f"docs/{path.name}: no test runs its commands"


def test_the_index_lists_every_page_and_decision() -> None:
    for folder in ("docs", "docs/decisions"):
        index = (ROOT / folder / "README.md").read_text(encoding="utf-8")
        for path in (ROOT / folder).glob("*.md"):
            assert path.name == "README.md" or f"({path.name})" in index, (
                f"{folder}/README.md does not list {path.name}"
            )
    index = (ROOT / "docs/decisions/README.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs/decisions").glob("[0-9]*.md"):
        title = path.read_text(encoding="utf-8").split("\n")[0].removeprefix("# ")
        assert title.startswith(f"{path.name[:4]} "), f"{path.name} has another number in its title"
        assert f"- [{title}]({path.name})" in index, f"the index has another title for {path.name}"


@pytest.mark.parametrize("page", ["README.md", "docs/generate.md", "docs/convert.md", "docs/compatibility.md"])
def test_snippets_run(page: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    assert snippets(page)
    for snippet in snippets(page):
        code = compile(snippet, page, "exec")
        # Of a library that FAT5 does not need; tests/parity/test_quantised.py says more of it.
        if "torchao" not in snippet or find_spec("torchao") is not None:
            exec(code, {})


def test_pages_link_to_what_is_there() -> None:
    for page in [ROOT / "README.md", ROOT / "README.fr.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


@pytest.mark.parametrize("page", ["README.md", "README.fr.md"])
def test_the_readme_lists_every_verb(page: str) -> None:
    readme = (ROOT / page).read_text(encoding="utf-8")
    for verb in VERBS:
        assert f"`fat5 {verb}`" in readme


def test_the_french_readme_says_what_the_english_one_says() -> None:
    """Its commands, snippets, links and numbers, those of the map apart; who changes one page changes the other."""
    english, french = ((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "README.fr.md"))
    assert commands("README.fr.md") == commands("README.md")
    assert snippets("README.fr.md") == snippets("README.md")
    links = [set(re.findall(r"\]\(([^)]+)\)", text)) - {"README.md", "README.fr.md"} for text in (english, french)]
    assert links[0] == links[1]
    french = re.sub(r"(?<=\d),(?=\d)", ".", french.replace("\u202f", ""))  # 1 234,5 as 1234.5
    english = re.sub(r"(?<=\d),(?=\d)", "", english)
    assert set(re.findall(r"\d+(?:\.\d+)*", french)) == set(re.findall(r"\d+(?:\.\d+)*", english))


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("publish", "README.md"),
        ("publish", "README.fr.md"),
        ("publish", "docs/demo.md"),
        ("publish", "docs/performance.md"),
        ("publish", "docs/generate.md"),
        ("publish", "docs/prepare.md"),
        ("publish", "docs/compatibility.md"),
        ("publish", "docs/reliability.md"),
        ("update_performance", "docs/performance.md"),
    ],
)
def test_figures_come_from_files(name: str, page: str) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (ROOT / page).read_text(encoding="utf-8")
    made = script.render(text, script.PAGES[page]) if name == "publish" else script.render(text)
    assert made == text, f"run python scripts/{name}.py"


def smaller(words: list[str]) -> list[str]:
    given = {word.removeprefix("--").split("=")[0] for word in words if word.startswith("--")}
    # A recipe's own values give way too, as flags win over it.
    extra = SMALLER.get(words[0], {})
    kept = {key: value for key, value in extra.items() if key not in given or key == "steps"}
    if "init_from" in given:  # the checkpoint says what the model is
        kept = {key: value for key, value in kept.items() if not key.startswith("model.")}
    return [part for key, value in kept.items() for part in (f"--{key}", value)]


class ParsedError(Exception):
    """Raised in place of the work."""


def assert_parses(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if "--help" in words:
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 0
        return
    module = import_module(f"fat5.cli.{words[0]}")
    real = parsing.parse

    def stop(*args: object, **kwargs: object) -> None:
        real(*args, **kwargs)  # type: ignore[arg-type]
        raise ParsedError

    with monkeypatch.context() as patch:
        patch.setattr(parsing, "parse", stop)
        if hasattr(module, "parse"):
            patch.setattr(module, "parse", stop)
        with pytest.raises(ParsedError):
            main(words)
