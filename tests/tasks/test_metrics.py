"""Metrics against the libraries they come from, published cases, and values worked out by hand."""

import importlib
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import scipy.stats
import sklearn.metrics
from rouge_score.rouge_scorer import RougeScorer

from fat5.errors import ConfigurationError, DataError
from fat5.tasks.metrics import KINDS, check_metric, measure, measure_with_intervals
from fat5.tasks.metrics.answers import normalise
from fat5.tasks.metrics.bootstrap import Metric, interval, mean_of, samples
from fat5.tasks.metrics.entities import entities
from fat5.tasks.metrics.labels import classification_metrics, regression_metrics
from fat5.tasks.metrics.text import Words

SAID = ["Le chat dort sur le tapis.", "It is a guide to action", "", "the cat the cat on the mat", "Élève étudié"]
RIGHT = ["Le chat dort sur un tapis rouge.", "It is a guide to action that ensures", "Rien", "the cat sat", "élève"]
EXACT = 1e-12


@pytest.fixture
def classes():
    random = np.random.default_rng(0)
    right = random.integers(5, size=80)
    said = np.where(random.random(80) < 0.6, right, random.integers(6, size=80))
    return [f"c{label}" for label in said], [f"c{label}" for label in right]


@pytest.fixture
def numbers():
    random = np.random.default_rng(1)
    right = random.integers(6, size=90).astype(float) + 1000  # ties, far from zero
    return (right + random.normal(size=90).round(1)).tolist(), right.tolist()


def expand(counts):
    """The examples of a sample, one by one."""
    return np.repeat(np.arange(len(counts)), counts.astype(int))


def test_bleu_and_chrf_are_sacrebleus():
    found = measure("text", SAID, RIGHT, ["bleu", "chrf"])
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(SAID, [RIGHT]).score, abs=EXACT)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(SAID, [RIGHT]).score, abs=EXACT)
    assert 20 < found["bleu"] < 100


def test_samples_of_bleu_are_corpora():
    (counts,) = samples(len(SAID), 20, seed=3)
    resampled = text_metric("bleu").resample(counts)
    for row, value in zip(counts, resampled, strict=True):
        said, right = [SAID[index] for index in expand(row)], [RIGHT[index] for index in expand(row)]
        assert value == pytest.approx(sacrebleu.corpus_bleu(said, [right]).score, abs=EXACT)


def text_metric(name):
    return importlib.import_module("fat5.tasks.metrics.text").text_metrics(SAID, RIGHT, [name])[name]


def test_several_references():
    said, right = ["the cat sat down", "a b c d e"], [["a cat sat", "the cat sat down"], ["a b c d x"]]
    streams = [["a cat sat", "a b c d x"], ["the cat sat down", None]]
    assert measure("text", said, right) == pytest.approx(
        {
            "bleu": sacrebleu.corpus_bleu(said, streams).score,
            "chrf": sacrebleu.corpus_chrf(said, streams).score,
            "rouge1": (100 + 80) / 2,
            "rouge2": (100 + 75) / 2,
            "rougeL": (100 + 80) / 2,
            "exact_match": 0.5,
        }
    )
    assert measure("text", ["", "x"], [[], []], ["bleu", "exact_match"]) == {"bleu": 0, "exact_match": 0.5}


def test_rouge_is_rouge_scores_on_english():
    said, right = (
        ["The cat's 2 hats, a_b.", "police killed the gunman"],
        ["the cat had 2 hats", "police kill the gunman"],
    )
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    found = measure("text", said, right, ["rouge1", "rouge2", "rougeL"])
    for name, value in found.items():
        scores = [scorer.score(target, text)[name].fmeasure for text, target in zip(said, right, strict=True)]
        assert value == pytest.approx(100 * np.mean(scores), abs=EXACT)
    assert measure("text", said[1:], right[1:], ["rougeL"])["rougeL"] == pytest.approx(75), "Lin 2004, section 3"


def test_rouge_keeps_accents_and_other_scripts():
    assert Words().tokenize("L'élève a étudié — ÇA !") == ["l", "élève", "a", "étudié", "ça"]
    assert Words().tokenize("e\u0301le\u0300ve") == ["élève"]
    assert Words().tokenize("हिन्दी में") == ["हिन्दी", "में"]
    assert measure("text", ["été"], ["âtre"], ["rouge1"])["rouge1"] == 0, "rouge-score itself finds t and r, t"
    assert measure("text", ["Москва"], ["москва"], ["rouge1"])["rouge1"] == 100


def test_exact_match_of_text():
    assert measure("text", [" oui", "non", "Non"], ["oui ", "non", "non"], ["exact_match"])["exact_match"] == 2 / 3


def test_classes_are_scikit_learns(classes):
    said, right = classes
    assert measure("classification", said, right) == {
        "accuracy": sklearn.metrics.accuracy_score(right, said),
        "macro_f1": sklearn.metrics.f1_score(right, said, average="macro"),
        "matthews": sklearn.metrics.matthews_corrcoef(right, said),
    }


def test_samples_of_classes_are_scikit_learns(classes):
    said, right = map(np.array, classes)
    metrics = classification_metrics(*classes, KINDS["classification"])
    (counts,) = samples(len(said), 30, seed=0)
    found = {name: metric.resample(counts) for name, metric in metrics.items()}
    for row, drawn in enumerate(map(expand, counts)):
        for name, value in measure("classification", said[drawn].tolist(), right[drawn].tolist()).items():
            assert found[name][row] == pytest.approx(value, abs=EXACT), name


def test_classes_by_hand():
    found = measure("classification", ["a", "a", "b", "b"], ["a", "b", "b", "b"])
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["matthews"] == pytest.approx((1 * 2 - 1 * 0) / math.sqrt(2 * 1 * 3 * 2))


@pytest.mark.parametrize(
    ("said", "right", "expected"),
    [(["a", "a"], ["a", "a"], (1.0, 1.0, 0.0)), (["a", "a"], ["b", "b"], (0.0, 0.0, 0.0)), (["a"], ["a"], (1, 1, 0))],
    ids=["one-class", "never-right", "one-example"],
)
def test_classes_at_the_edge(said, right, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measure_with_intervals("classification", said, right, resamples=20)
    assert tuple(row["value"] for row in found.values()) == expected
    assert all(row["low"] == row["high"] == row["value"] for row in found.values())


def test_numbers_are_scipys(numbers):
    found = measure("regression", *numbers)
    assert found["pearson"] == scipy.stats.pearsonr(*numbers).statistic
    assert found["spearman"] == scipy.stats.spearmanr(*numbers).statistic
    assert found["mean_squared_error"] == pytest.approx(np.mean(np.subtract(*numbers) ** 2), rel=EXACT)
    assert measure("regression", [1.0, 2.0, 4.0], [1.0, 3.0, 2.0]) == pytest.approx(
        {"pearson": 0.3273268, "spearman": 0.5, "mean_squared_error": 5 / 3}, abs=1e-6
    )


def test_samples_of_numbers_are_scipys(numbers):
    said, right = map(np.array, numbers)
    metrics = regression_metrics(*numbers, KINDS["regression"])
    (counts,) = samples(len(said), 30, seed=0)
    found = {name: metric.resample(counts) for name, metric in metrics.items()}
    for row, drawn in enumerate(map(expand, counts)):
        for name, value in measure("regression", said[drawn], right[drawn]).items():
            assert found[name][row] == pytest.approx(value, rel=1e-9), name


def test_correlation_with_a_constant_is_not_defined():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measure_with_intervals("regression", [2.5, 2.5, 2.5], [1.0, 2.0, 3.0], resamples=20)
    assert math.isnan(found["pearson"]["value"])
    assert math.isnan(found["spearman"]["low"])
    assert found["mean_squared_error"]["value"] == pytest.approx((2.25 + 0.25 + 0.25) / 3)


def test_numbers_that_are_not_finite():
    found = measure_with_intervals("regression", [1.0, math.nan], [1.0, 2.0], resamples=5)
    assert all(math.isnan(value) for row in found.values() for value in row.values())


@pytest.mark.parametrize("kind", KINDS)
def test_no_examples(kind):
    found = measure_with_intervals(kind, [], [], resamples=5)
    assert list(found) == list(KINDS[kind])
    assert all(math.isnan(value) for row in found.values() for value in row.values())


TAGS = ["O", "B-PER", "I-PER", "E-PER", "S-PER", "B-LOC", "I-LOC", "B-a-b", "I-a-b", "B", "I"]


def test_entities_are_seqevals():
    """On random sequences, in which most entities are malformed."""
    from seqeval.metrics import f1_score, precision_score, recall_score
    from seqeval.metrics.sequence_labeling import get_entities

    random = np.random.default_rng(0)
    some = 0
    for _ in range(300):
        right = [random.choice(TAGS, size=random.integers(1, 9)).tolist() for _ in range(4)]
        said = [[tag if random.random() < 0.7 else str(random.choice(TAGS)) for tag in row] for row in right]
        for row in right + said:
            assert entities(row) == get_entities(row), row
        found = measure("entities", said, right)
        assert found["precision"] == pytest.approx(precision_score(right, said), abs=EXACT)
        assert found["recall"] == pytest.approx(recall_score(right, said), abs=EXACT)
        assert found["f1"] == pytest.approx(f1_score(right, said), abs=EXACT)
        some += found["f1"] > 0
    assert some > 250


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["O", "I-PER", "I-PER"], [("PER", 1, 2)]),
        (["B-PER", "I-LOC"], [("PER", 0, 0), ("LOC", 1, 1)]),
        (["PER", "PER", "O", "ORG", "LOC"], [("PER", 0, 1), ("ORG", 3, 3), ("LOC", 4, 4)]),
        (["B-PER", "I-PER", "L-PER", "U-PER", "U-LOC"], [("PER", 0, 2), ("PER", 3, 3), ("LOC", 4, 4)]),
        ([], []),
    ],
    ids=["I-after-O", "another-type", "plain", "BILOU", "empty"],
)
def test_entities_by_hand(tags, expected):
    assert entities(tags) == expected


def test_no_entities():
    assert measure("entities", [["O", "O"]], [["O", "O"]]) == {"precision": 0, "recall": 0, "f1": 0, "accuracy": 1}
    with pytest.raises(DataError, match="example 1 has 1 predicted tags for 2 target tags"):
        measure("entities", [["O"], ["O"]], [["O"], ["O", "O"]])


@pytest.mark.parametrize(
    ("said", "right", "exact", "f1"),
    [
        ("The Denver Broncos!", ["Denver Broncos", "the Broncos"], 1, 1),
        ("Santa Clara", ["Santa Clara, California", "Levi's Stadium"], 0, 0.8),
        ("in the 1870s", ["1870"], 0, 0),
        ("a an the", ["."], 1, 1),
        ("", [], 1, 1),
        ("Normandy", [], 0, 0),
        ("", ["Normandy"], 0, 0),
        ("to to be", ["to be be"], 0, 2 / 3),
    ],
)
def test_answers_as_squad_scores_them(said, right, exact, f1):
    """Worked out with the definitions of SQuAD's evaluation script, version 2.0."""
    assert measure("answers", [said], [right]) == pytest.approx({"exact_match": exact, "f1": f1})


def test_answers_in_french():
    assert normalise("L’école de l'État", "fr") == "école de état"
    assert normalise("L'école", "en") == "lécole", "SQuAD's own form"
    assert normalise("« Les Misérables »…", "fr") == "misérables"
    assert normalise("Les Misérables", None) == "les misérables"
    assert normalise("la Lad'or d'or du Nord", "fr") == "lador or nord"
    assert measure("answers", ["Victor Hugo"], [["le Victor Hugo"]], articles="fr")["exact_match"] == 1
    with pytest.raises(ConfigurationError, match="articles is 'de'"):
        measure("answers", ["x"], [["x"]], articles="de")


def test_intervals_are_those_of_the_binomial():
    """400 examples, 70% right: the bootstrap is within a percent of the normal interval."""
    said = ["a"] * 280 + ["b"] * 120
    found = measure_with_intervals("classification", said, ["a"] * 400, ["accuracy"], resamples=4000)["accuracy"]
    half = 1.96 * math.sqrt(0.7 * 0.3 / 400)
    assert found["value"] == 0.7
    assert found["low"] == pytest.approx(0.7 - half, abs=0.005)
    assert found["high"] == pytest.approx(0.7 + half, abs=0.005)


def test_intervals_repeat_and_follow_the_seed(numbers):
    first, same, other = (measure_with_intervals("regression", *numbers, resamples=50, seed=seed) for seed in (0, 0, 1))
    assert first == same
    assert first["pearson"]["low"] != other["pearson"]["low"]
    assert all(row["low"] < row["value"] < row["high"] for row in first.values())


def test_samples_do_not_depend_on_how_many_are_held(monkeypatch):
    whole = np.concatenate([*samples(50, 20, seed=1)])
    monkeypatch.setattr("fat5.tasks.metrics.bootstrap.MOST_COUNTS", 150)
    parts = [*samples(50, 20, seed=1)]
    assert len(parts) == 7
    assert np.array_equal(np.concatenate(parts), whole)
    assert (whole.sum(1) == 50).all()


def test_undefined_samples_are_left_out():
    assert interval([math.nan, 1.0, math.nan, 3.0]) == pytest.approx((1.05, 2.95))
    assert mean_of([1.0, 2.0]).value() == 1.5
    assert math.isnan(Metric(0, lambda counts: counts[:, 0]).value())


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("text", "rouge-l", "Did you mean rougeL?"),
        ("text", "BLUE", "Did you mean bleu?"),
        ("classification", "f1", "Did you mean macro_f1?"),
        ("regression", "zzz", "Choose among pearson, spearman, mean_squared_error"),
        ("classifcation", "f1", "Did you mean classification?"),
    ],
)
def test_wrong_names(kind, name, said):
    with pytest.raises(ConfigurationError) as error:
        check_metric(kind, name)
    assert said in str(error.value)
    with pytest.raises(ConfigurationError):
        measure(kind, [], [], [name])


def test_sides_of_unequal_length():
    with pytest.raises(DataError, match="1 predictions for 2 targets"):
        measure("text", ["a"], ["a", "b"])


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("sacrebleu.metrics", "text"),
        ("rouge_score.rouge_scorer", "text"),
        ("sklearn.metrics", "classification"),
        ("scipy.stats", "regression"),
    ],
)
def test_a_missing_library(module, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=r"pip install 'fat5\[eval\]'"):
        measure(kind, [], [])


def test_the_names_need_no_library():
    code = "import sys, fat5.tasks.metrics; print({'numpy', 'torch', 'scipy', 'sklearn', 'sacrebleu'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_the_page_runs():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(snippet, {})
    for kind, names in KINDS.items():
        for name in names:
            assert re.search(rf"^\| {kind} \|[^|]*`{name}`", page, re.MULTILINE), f"{kind}: {name}"
