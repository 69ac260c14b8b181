"""results.json, its drawings, and the interval over seeds."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from matplotlib.image import imread

from fat5.tasks.metrics import measure, measure_with_intervals
from fat5.tasks.metrics.labels import confusion, measure_by_class
from fat5.tasks.results import aggregate, draw_classes, draw_confusion, results_of, results_table, results_text

HEAD = {"examples": 3, "split": "test", "model": "runs/m", "task": "regression"}


def test_the_file_says_what_was_measured():
    said, right = [1.0, 2.0, 3.5], [1.0, 2.0, 3.0]
    scores = measure_with_intervals("regression", said, right, resamples=20)
    content = results_of(scores, **HEAD, seed=7)
    assert content == {**HEAD, "metrics": scores, "seed": 7}
    assert json.loads(results_text(content)) == content


def test_what_is_not_defined_is_null():
    content = results_of(measure("regression", [1.0, 1.0], [1.0, 2.0]), **HEAD, more=[math.inf])
    assert json.loads(results_text(content), parse_constant=pytest.fail) == content
    assert content["metrics"]["pearson"] == {"value": None, "low": None, "high": None}
    assert content["metrics"]["mean_squared_error"]["value"] == 0.5
    assert content["more"] == [None]


def results(*values):
    return [{"metrics": {"f1": {"value": value}}} for value in values]


def test_interval_over_seeds_is_students():
    values = [0.61, 0.64, 0.7]
    found = aggregate(results(*values))["f1"]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(0.65)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected))
    assert found["values"] == values


@pytest.mark.parametrize(
    ("values", "mean"), [((0.5,), 0.5), ((0.5, None), None), ((math.nan, 0.5), None)], ids=["one", "null", "nan"]
)
def test_seeds_without_an_interval(values, mean):
    found = aggregate(results(*values))["f1"]
    assert (found["mean"], found["low"], found["high"]) == (mean, None, None)


def test_seeds_that_agree():
    assert aggregate(results(0.5, 0.5))["f1"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "values": [0.5, 0.5]}
    assert aggregate([]) == {}


def test_classes_are_scikit_learns():
    random = np.random.default_rng(0)
    right = [f"c{label}" for label in random.integers(4, size=60)]
    said = [label if random.random() < 0.6 else f"c{random.integers(5)}" for label in right]
    labels = sorted({*right, *said})
    assert confusion(said, right, labels).tolist() == sklearn.metrics.confusion_matrix(right, said).tolist()
    found = measure_by_class("classification", said, right)
    expected = sklearn.metrics.precision_recall_fscore_support(right, said, zero_division=0.0)
    assert list(found) == labels
    for name, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [score[name] for score in found.values()] == pytest.approx(column.tolist()), name


def test_types_of_entities_are_seqevals():
    from seqeval.metrics import classification_report

    random = np.random.default_rng(0)
    tags = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    right = [random.choice(tags, size=8).tolist() for _ in range(30)]
    said = [[tag if random.random() < 0.7 else str(random.choice(tags)) for tag in row] for row in right]
    report = classification_report(right, said, output_dict=True)
    found = measure_by_class("entities", said, right)
    assert list(found) == ["LOC", "PER"]
    for name, score in found.items():
        assert score == pytest.approx({key.removesuffix("-score"): value for key, value in report[name].items()})


@pytest.mark.parametrize("count", [1, 3, 15, 16, 80])
def test_drawings(count, tmp_path, recwarn):
    random = np.random.default_rng(0)
    labels = [f"class {index} $\\of a long name_{index}$" for index in range(count)]
    if count == 3:
        labels[1:] = ["中文", "$"]
    matrix = random.integers(20, size=(count, count))
    matrix[: count // 3] = 0  # classes without targets
    scores = {label: {"f1": random.random(), "support": 1234} for label in labels}
    draw_confusion(labels, matrix, tmp_path / "confusion.png")
    draw_classes(scores, tmp_path / "classes.png")
    for name in ("confusion.png", "classes.png"):
        picture = imread(tmp_path / name)
        assert min(picture.shape[:2]) > 200
        assert picture.std() > 0.01, "not a blank sheet"
    assert [str(warning.message) for warning in recwarn] == []


def test_no_entities_to_draw(tmp_path):
    draw_classes({}, tmp_path / "classes.png")
    assert imread(tmp_path / "classes.png").size


def test_confusion_shows_shares_of_rows(tmp_path):
    """Two classes, the second a hundred times the first: their cells are as dark."""
    draw_confusion(["a", "b"], [[9, 1], [100, 900]], tmp_path / "confusion.png")
    picture = imread(tmp_path / "confusion.png")[:, :, :3]
    dark = np.array([0x17 * 0.9 + 25.5, 0x69 * 0.9 + 25.5, 0xAA * 0.9 + 25.5]) / 255  # 90% of COLOURS[0] over white
    share = (np.abs(picture - dark).max(-1) < 0.015).mean()
    one_cell = (np.abs(picture - (1 - 0.1 * (1 - np.array([0x17, 0x69, 0xAA]) / 255))).max(-1) < 0.015).mean()
    assert share == pytest.approx(one_cell, rel=0.2), "two dark cells and two light ones"


def test_table_of_a_run_and_of_its_seeds():
    score = {"value": 0.5, "low": 0.25, "high": 0.75}
    content = results_of({"f1": score, "mean_squared_error": 2.0}, examples=1200, split="test", model="m", task="t")
    lines = results_table(content | {"examples_cut": 3}).splitlines()
    assert lines[0] == "t, 1,200 examples of test, 3 of them cut"
    assert lines[3].split() == ["f1", "0.5000", "0.2500", "to", "0.7500"]
    assert lines[4].split() == ["mean_squared_error", "2.0000", "–"]
    seeds = {"metrics": aggregate([content, content]), "seeds": [0, 1]}
    lines = results_table(content | seeds).splitlines()
    assert lines[0].endswith("2 seeds")
    assert lines[2].split() == ["metric", "mean", "95%", "interval"]
    assert lines[3].split() == ["f1", "0.5000", "0.5000", "to", "0.5000"]


def test_table_leaves_many_classes_to_the_file():
    by_class = {f"c{index}": {"precision": 1.0, "recall": 0.5, "f1": 0.6667, "support": 4} for index in range(21)}
    content = results_of({"f1": 0.5}, examples=84, split="test", model="m", task="t", by_class=by_class)
    assert "c20" not in results_table(content)
    del content["by_class"]["c20"]
    assert results_table(content).splitlines()[-1].split() == ["c19", "1.0000", "0.5000", "0.6667", "4"]
