"""The command line and the YAML file: what works, and one clear line for what does not."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from fat5.cli.parsing import parse
from fat5.errors import ConfigurationError
from fat5.yaml_text import LARGEST_CONFIGURATION


@dataclass
class Optimizer:
    """An optimizer."""

    lr: float = 1e-3
    """Learning rate."""


@dataclass
class Recipe:
    """A recipe."""

    output_dir: str
    """Where to write."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """The optimizer."""
    steps: int | None = None
    """How many."""


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("output_dir: a\noptimizer:\n  lr: 5e-1\nsteps: 3\n")
    values = parse(Recipe, ["--config", str(file), "--steps", "4"], "pretrain")
    assert values == {"output_dir": "a", "optimizer": Optimizer(lr=0.5), "steps": 4}


def test_a_function_takes_words() -> None:
    def plot(runs: list[str], width: int = 3) -> None:
        """Draws.

        Args:
            runs: folders.
            width: inches.
        """

    assert parse(plot, ["a", "b", "--width", "5"], "plot", words="runs") == {"runs": ["a", "b"], "width": 5}


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("optimizer:\n  lrr: 1\noutput_dir: a\n", "Did you mean optimizer.lr?"),
        ("output_dir: a\nstep: 1\n", "Did you mean steps?"),
        ("output_dir: a\nsteps: many\n", "steps"),
        ("steps: 1\n", "output_dir"),
        ("a: [1\nb: 2", "recipe.yaml:2: not valid YAML"),
        ("a: &x [1]\nb: [*x, *x]\n", "aliases"),
        ("just words", "holds no keys"),
        ("", "holds no keys"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("[" * 100_000, "YAML"),
        ("output_dir: a\nsteps: 1\nsteps: 2\n", "recipe.yaml:3: key 'steps' stands twice"),
        ("output_dir: a\noptimizer:\n  lr: 1\n  lr: 2\n", "recipe.yaml:4: key 'lr' stands twice"),
        ('{"output_dir": "a", "steps": 1, "steps": 2}', "recipe.yaml:1: key 'steps' stands twice"),
        ("output_dir: a\nmixture: [{mu: 3, r: 0.1, mu: 8}]\n", "recipe.yaml:2: key 'mu' stands twice"),
    ],
    ids=[
        "nested-typo",
        "typo",
        "type",
        "missing",
        "syntax",
        "alias",
        "text",
        "empty",
        "python-tag",
        "deep",
        *("twice", "twice-nested", "twice-json", "twice-in-list"),
    ],
)
def test_a_bad_file_gets_one_line(tmp_path: Path, yaml: str, said: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml)
    with pytest.raises(ConfigurationError) as caught:
        parse(Recipe, ["--config", str(file)], "pretrain")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_junk_huge_and_absent_files_are_named(tmp_path: Path) -> None:
    junk, huge = tmp_path / "junk.yaml", tmp_path / "huge.yaml"
    junk.write_bytes(b"\x00\xff\xfe")
    huge.write_text("# " + "x" * LARGEST_CONFIGURATION)
    for file, said in [(junk, "UTF-8"), (huge, "too large"), (tmp_path / "hug.yaml", "Did you mean")]:
        with pytest.raises(ConfigurationError, match=said):
            parse(Recipe, [f"--config={file}"], "pretrain")


def test_a_key_twice_on_the_command_line_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"--optimizer:1: key 'lr' stands twice"):
        parse(Recipe, ["--output_dir", "a", "--optimizer", "{lr: 1, lr: 2}"], "pretrain")


def test_an_empty_name_and_a_dead_link_are_no_recipes(tmp_path: Path) -> None:
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    for name, said in [("", "config: is empty"), (str(loop), r"loop\.yaml: is a link that leads to no file")]:
        with pytest.raises(ConfigurationError, match=said):
            parse(Recipe, [f"--config={name}"], "pretrain")


@pytest.mark.parametrize(
    ("flag", "meant"),
    [("--optimizer.lrr", "--optimizer.lr"), ("--lr", "--optimizer.lr"), ("--setps", "--steps")],
)
def test_an_unknown_flag_suggests_the_near_one(flag: str, meant: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^no key {flag}\. Did you mean {meant}\?"):
        parse(Recipe, ["--output_dir", "a", flag, "1"], "pretrain")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--seed x", "seed: expected a whole number, got 'x'"),
        ("--compile=maybe", "compile: expected true, false or auto, got 'maybe'"),
        ("--sizes 1 x", "sizes: expected a list of whole numbers, got"),
        ("--seed", "seed: expected a value, got none"),
        ("--compile=aut", "Did you mean auto?"),
        ("--betas 0.9", "betas: expected a list of 2 numbers, got '0.9'"),
        ("--logs [hre]", "logs: expected a list of here or there, got 'hre'. Did you mean here?"),
        ("--keys {a:1}", "keys: expected keys with values, got '{a:1}'. Write a space after each colon"),
        ("--clip x", "clip: expected a number or null, got 'x'"),
    ],
)
def test_a_wrong_value_is_told_in_our_words(words: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(Job, words.split(), "prepare", words="inputs")
    assert said in str(caught.value)
    assert not any(theirs in str(caught.value) for theirs in ("Parser key", "typing", "<class", "Union"))


def test_a_recipe_has_a_section_a_verb(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("tokenizer: {vocab_size: 5}\npretrain: {output_dir: a, steps: 7}\n")
    assert parse(Recipe, ["--config", str(file)], "pretrain")["steps"] == 7
    with pytest.raises(ConfigurationError, match="tokenizer"):
        parse(Recipe, ["--config", str(file)], "plot")


@dataclass
class Job:
    """A job."""

    inputs: list[str] = field(default_factory=list)
    """Files."""
    sizes: list[int] | None = None
    """Sizes."""
    strict: bool = False
    """Stop at the first fault."""
    compile: bool | Literal["auto"] = "auto"
    """Compile."""
    note: str = ""
    """A note."""
    betas: tuple[float, float] | None = None
    """Decay."""
    logs: list[Literal["here", "there"]] = field(default_factory=list)
    """Places."""
    keys: dict[str, int] = field(default_factory=dict)
    """Keys."""
    clip: float | None = 1.0
    """Norm."""
    seed: int = 0
    """Of chance."""


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("--strict", {"strict": True}),
        ("--strict --seed -1", {"strict": True, "seed": -1}),
        ("--strict false", {"strict": False}),
        ("--strict=false a", {"strict": False, "inputs": ["a"]}),
        ("--strict a", {"strict": True, "inputs": ["a"]}),
        ("--compile", {"compile": True}),
        ("--compile auto a", {"compile": "auto", "inputs": ["a"]}),
        ("a b --note x", {"inputs": ["a", "b"], "note": "x"}),
        ("--note x a b", {"inputs": ["a", "b"], "note": "x"}),
        ("a --note x -- --b", {"inputs": ["a", "--b"], "note": "x"}),
        ("--inputs a", {"inputs": ["a"]}),
        ("--inputs=a --note=x", {"inputs": ["a"], "note": "x"}),
        ("--inputs a b --strict", {"inputs": ["a", "b"], "strict": True}),
        ('--inputs ["a","b"]', {"inputs": ["a", "b"]}),
        ("--inputs+ a --inputs+ b", {"inputs": ["a", "b"]}),
        ("--sizes 80 90", {"sizes": [80, 90]}),
        ("--sizes null", {"sizes": None}),
    ],
)  # fmt: skip
def test_what_a_person_types(line: str, keys: dict[str, Any]) -> None:
    assert parse(Job, line.split(), "prepare", words="inputs") == vars(Job()) | keys


def test_words_after_a_bare_flag_stay_positional() -> None:
    values = parse(Job, ["--strict", "a ___ b", "--", "--c"], "generate", words="inputs")
    assert (values["strict"], values["inputs"]) == (True, ["a ___ b", "--c"])
    assert parse(Job, ["--strict"], "generate", words="inputs")["inputs"] == []


def test_words_arrive_as_they_were_typed(tmp_path: Path) -> None:
    words = ["😀 {a}", "é", "null", "12", "[a, b]", "{a: 1, a: 2}", "- x", "a\nb", "\\n", "# ", '"', "'", "%"]
    words += ["\ufeff", "\x07", "\x7f", "\x85", "\x9f", "\u2028", "\ufffe"]
    assert parse(Job, words, "prepare", words="inputs")["inputs"] == words
    assert parse(Job, ["--inputs", *words], "prepare", words="inputs")["inputs"] == words
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"inputs": words, "note": "".join(words)}))
    values = parse(Job, ["--config", str(file)], "prepare", words="inputs")
    assert (values["inputs"], values["note"]) == (words, "".join(words))


def test_one_word_may_be_the_value_of_a_key() -> None:
    assert parse(Job, ["a: b"], "convert", words="note")["note"] == "a: b"
    with pytest.raises(ConfigurationError, match="unrecognized arguments: b"):
        parse(Job, ["a", "b"], "convert", words="note")


def test_a_list_is_not_taken_from_two_places() -> None:
    with pytest.raises(ConfigurationError, match="both as words and with --inputs"):
        parse(Job, ["a", "--inputs", "b"], "prepare", words="inputs")
    with pytest.raises(ConfigurationError, match="strict"):
        parse(Job, ["--strict", "5"], "pretrain")


def test_flags_win_over_the_file_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("seed: 3\ninputs: [a]\nnote: kept\n")
    values = parse(Job, ["--seed", "4", "b", "--config", str(file)], "prepare", words="inputs")
    assert (values["seed"], values["inputs"], values["note"]) == (4, ["b"], "kept")


@pytest.mark.parametrize("words", [["--text", "# a"], ["--text=#"], ["--count", " #1"]])
def test_a_value_that_yaml_takes_for_a_comment_is_not_dropped(words: list[str]) -> None:
    def verb(text: str | None = None, count: int | None = None) -> None:
        """A verb."""

    with pytest.raises(ConfigurationError, match="begins with #, a comment"):
        parse(verb, words, "verb")
    assert parse(verb, ["--text", "a # b"], "verb")["text"] == "a # b"


@pytest.mark.parametrize("key", ["strict", "compile", "note", "inputs"])
def test_null_is_refused_where_the_key_does_not_allow_it(key: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{key}: null\nsizes: null\n")
    with pytest.raises(ConfigurationError, match=f"{key}: null is no value here"):
        parse(Job, ["--config", str(file)], "prepare", words="inputs")
