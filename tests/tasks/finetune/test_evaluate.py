"""What a run of each task leaves; `fat5 evaluate`: its results again, models of others, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from test_runs import LEARNING, config, predictions
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
)

import fat5
from fat5.cli.main import main
from fat5.data import load_tokenizer
from fat5.tasks.finetune import predicting
from fat5.tasks.finetune.config import METRICS, LoraConfig
from fat5.tasks.finetune.finetuning import finetune


def evaluate(capsys, *words):
    """What the command prints; it succeeds."""
    capsys.readouterr()
    code = main(["evaluate", *map(str, words)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def refused(capsys, *words):
    """The one line of a command that fails."""
    capsys.readouterr()
    assert main(["evaluate", *map(str, words)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def same_results(one, other):
    """Two contents of results.json, but for the model's folder."""
    one, other = (json.loads(path.read_text()) | {"model": None} for path in (one, other))
    assert one == other


@pytest.fixture(scope="module")
def runs(base, files, tmp_path_factory):
    """Task → the folder of a fine-tuned run, made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(task):
        if task not in made:
            finetune(config(base, files, folder / task, task, **({"languages": ["fr"]} if "question" in task else {})))
            made[task] = folder / task
        return made[task]

    return get


@pytest.mark.parametrize("task", list(METRICS))
def test_every_task(runs, drawn, task):
    run = runs(task)
    results, summary = (json.loads((run / f"{name}.json").read_text()) for name in ("results", "summary"))
    assert list(results["metrics"]) == list(METRICS[task])
    for score in results["metrics"].values():
        assert score["low"] <= score["value"] <= score["high"]
    rows = predictions(run)
    assert len(rows) == results["examples"] == summary["examples"]["validation"]
    assert rows[0].keys() >= {"input", "target", "prediction"}
    assert (run / "loss.png").is_file()
    assert (run / "checkpoints" / "step-4").is_dir()
    card = (run / "model" / "README.md").read_text()
    assert "## Fine-tuning" in card
    assert "pipeline_tag" in card
    widget = yaml.safe_load(card.split("---")[1])["widget"][0]
    first = predictions(run)[0]
    assert widget["text"] == first["input"]
    assert ("context" in widget) == (task == "question-answering")
    pictures = {path.name for path in run.glob("*.png")} - {"loss.png"}
    wanted = {"sequence-classification": {"confusion.png", "classes.png"}, "token-classification": {"classes.png"}}
    assert pictures == wanted.get(task, set())


@pytest.mark.parametrize("task", list(METRICS))
def test_a_run_is_scored_as_it_was(runs, task, tmp_path, capsys):
    run = runs(task)
    out, said = tmp_path / "scores.json", tmp_path / "said.jsonl"
    table = evaluate(capsys, "--model", run, "--output", out, "--predictions", said)
    same_results(out, run / "results.json")
    assert said.read_bytes() == (run / "predictions.jsonl").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"scores.json", "said.jsonl"}
    assert table.startswith(f"{task}, ")
    assert all(f"\n{name} " in table for name in METRICS[task])
    assert ("\nclass " in table) == (task in ("sequence-classification", "token-classification"))


def test_parts_of_a_run_and_its_splits(runs, files, tmp_path, capsys):
    run, out = runs("sequence-classification"), tmp_path / "scores.json"
    for part in ("model", "checkpoints/step-4"):
        evaluate(capsys, "--model", run / part, "--output", out)
        same_results(out, run / "results.json")
    evaluate(capsys, "--model", run, "--split", "train", "--output", out)
    train = json.loads(out.read_text())
    assert train["split"] == "train"
    assert train["examples"] == json.loads((run / "summary.json").read_text())["examples"]["train"]
    evaluate(capsys, "--model", run, "--data", files["sequence-classification"], "--max_examples", 7, "--output", out)
    some = json.loads(out.read_text())
    assert (some["split"], some["examples"]) == (files["sequence-classification"], 7)
    evaluate(capsys, "--model", run, "--max_examples", 3, "--predictions", tmp_path / "said.jsonl")
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert said == predictions(run)[:3]
    assert "max_examples: must be a whole number" in refused(capsys, "--model", run, "--max_examples", 0)
    assert "and the run has train, validation" in refused(capsys, "--model", run, "--split", "test")


def test_columns_and_prefix_of_a_file_win_over_the_run(runs, tmp_path, capsys):
    run = runs("text-to-text")
    rows = predictions(run)[:5]
    data = tmp_path / "new.jsonl"
    data.write_text("".join(json.dumps({"de": row["input"][3:], "vers": row["target"]}) + "\n" for row in rows))
    words = ["--model", run, "--data", data, "--columns.target", "vers", "--predictions", tmp_path / "said.jsonl"]
    assert "no column 'translation.fr'; it has de, vers" in refused(capsys, *words)
    evaluate(capsys, *words, "--columns.source", "de", "--prefix", "fr: ")
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [row["input"] for row in said] == ["fr: " + row["input"][3:] for row in rows]
    assert "Did you mean source?" in refused(capsys, *words, "--columns.sourc", "de")
    assert "columns.source: null" in refused(capsys, *words, "--columns.source", "null")


def test_predictions_go_on_where_a_kill_ended_them(runs, tmp_path, capsys, monkeypatch):
    run, said = runs("text-to-text"), tmp_path / "said.jsonl"
    words = ["--model", str(run), "--predictions", str(said), "--predict_batch", "4"]
    written, add = [], predicting.PredictionFile.add

    def add_and_fail(self, some):
        add(self, some)
        written.append(len(some))
        if len(written) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(predicting.PredictionFile, "add", add_and_fail)
    assert main(["evaluate", *words]) == 130
    assert not said.exists()
    evaluate(capsys, *words)
    assert sum(written) == len(predictions(run))
    assert len(written) > 1
    monkeypatch.undo()
    assert said.read_text().count("\n") == len(predictions(run))
    assert [path.name for path in tmp_path.iterdir()] == ["said.jsonl"]


@pytest.mark.parametrize("task", ["text-to-text", "sequence-classification"])
def test_adapters(base, files, tmp_path, capsys, task):
    pytest.importorskip("peft")
    run, out = tmp_path / "run", tmp_path / "scores.json"
    finetune(config(base, files, run, task, lora=LoraConfig(rank=4)))
    for part in ("", "adapter"):
        evaluate(capsys, "--model", run / part, "--output", out)
        same_results(out, run / "results.json")
    assert "is a checkpoint of adapters" in refused(capsys, "--model", run / "checkpoints" / "step-4")
    file = run / "adapter" / "adapter_config.json"
    kept = file.read_text()
    file.write_text(json.dumps(json.loads(kept) | {"base_model_name_or_path": "google/flan-t5-small"}))
    assert "base 'google/flan-t5-small' is no folder here" in refused(capsys, "--model", run / "adapter")
    file.write_text(kept)
    shutil.move(run / "adapter", tmp_path / "adapter")
    words = ["--model", tmp_path / "adapter", "--task", task, "--data", files[task]]
    if task == "text-to-text":
        words += ["--columns.source", "translation.fr", "--columns.target", "translation.en", "--max_examples", 4]
        assert "4 examples" in evaluate(capsys, *words, "--max_new_tokens", 4)
        assert "holds an adapter of SEQ_2_SEQ_LM" not in capsys.readouterr().err
    else:
        assert "an adapter alone does not say its labels" in refused(capsys, *words)


@pytest.fixture(scope="module")
def stock(base, tmp_path_factory):
    """A folder of stock transformers with random weights and a head of classes, and its seq2seq sibling."""
    folder = tmp_path_factory.mktemp("stock")
    size = load_tokenizer(base / "model").info.vocab_size
    sizes = {"vocab_size": size, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    sizes["decoder_start_token_id"] = 0
    torch.manual_seed(0)
    T5ForSequenceClassification(T5Config(**sizes, num_labels=3)).eval().save_pretrained(folder / "head")
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(folder / "seq2seq")
    T5ForTokenClassification(T5Config(**sizes, id2label={0: "O", 1: "B-UP"})).save_pretrained(folder / "tags")
    T5ForQuestionAnswering(T5Config(**sizes)).save_pretrained(folder / "answers")
    return folder


def test_a_stock_head_is_scored(stock, base, files, tmp_path, capsys):
    rows = [json.loads(line) for line in Path(files["sequence-classification"]).read_text().splitlines()[:12]]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row | {"label": index % 3}) + "\n" for index, row in enumerate(rows)))
    said = tmp_path / "said.jsonl"
    words = ["--model", stock / "head", "--task", "sequence-classification", "--data", data, "--predictions", said]
    assert "holds no tokenizer. Give the one that the model was trained with: --tokenizer DIR" in refused(
        capsys, *words
    )
    words += ["--tokenizer", base / "model"]
    assert "accuracy" in evaluate(capsys, *words)
    model = T5ForSequenceClassification.from_pretrained(stock / "head").eval()
    tokenizer = load_tokenizer(base / "model")
    tokens, lengths = tokenizer.encode_documents([row["text"] for row in rows])
    eos = torch.tensor([tokenizer.info.eos_id])
    documents = [torch.cat([part, eos]) for part in torch.from_numpy(tokens).long().split(lengths.tolist())]
    with torch.no_grad():
        right = [str(int(model(ids[None]).logits.argmax())) for ids in documents]
    assert [json.loads(line)["prediction"] for line in said.read_text().splitlines()] == right
    data.write_text(json.dumps({"text": "Le noyau", "label": 3}) + "\n")
    assert "label '3' is not one that the model learned" in refused(capsys, *words)


@pytest.mark.parametrize(("kind", "task"), [("tags", "token-classification"), ("answers", "question-answering")])
def test_stock_heads_of_tags_and_answers_are_scored(stock, base, files, tmp_path, capsys, kind, task):
    out, said = tmp_path / "scores.json", tmp_path / "said.jsonl"
    words = ["--model", stock / kind, "--task", task, "--data", files[task], "--tokenizer", base / "model"]
    words += ["--max_examples", 5, "--max_source_tokens", 128, "--stride", 16]
    evaluate(capsys, *words, "--output", out, "--predictions", said)
    scores, rows = (json.loads(out.read_text()), [json.loads(line) for line in said.read_text().splitlines()])
    assert scores["examples"] == len(rows) == 5
    if kind == "tags":
        assert all(set(row["prediction"]) <= {"O", "B-UP"} for row in rows)
        right = [one == other for row in rows for one, other in zip(row["prediction"], row["target"], strict=True)]
        assert scores["metrics"]["accuracy"]["value"] == sum(right) / len(right)
    else:
        assert all(row["prediction"] for row in rows)  # each question has an answer, so the model must give one


def test_a_stock_seq2seq_is_scored(stock, base, files, capsys):
    words = ["--model", stock / "seq2seq", "--tokenizer", base / "model", "--max_examples", 3, "--max_new_tokens", 3]
    words += ["--columns.source", "translation.fr", "--columns.target", "translation.en"]
    assert "3 examples" in evaluate(capsys, *words, "--task", "text-to-text", "--data", files["text-to-text"])


def test_what_does_not_go_together(base, runs, files, tmp_path, capsys):
    file, task = files["sequence-classification"], "sequence-classification"
    seq2seq = ["--model", base, "--data", file]
    assert "task is not given, and" in refused(capsys, *seq2seq)
    line = refused(capsys, *seq2seq, "--task", task)
    assert "needs one ForSequenceClassification. Train it first: `fat5 finetune --task sequence-classification`" in line
    head = ["--model", runs(task), "--data", files["text-to-text"], "--columns.source", "translation.fr"]
    assert "and text-to-text needs one ForConditionalGeneration" in refused(capsys, *head, "--task", "text-to-text")
    assert "needs one number" in refused(capsys, "--model", runs(task), "--task", "regression")
    assert "predicts a number" in refused(capsys, "--model", runs("regression"), "--task", task)
    bare = tmp_path / "bare"
    shutil.copytree(base / "model", bare)
    settings = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(settings | {"architectures": None}))
    assert "has no classification_head" in refused(capsys, "--model", bare, "--data", file, "--task", task)
    assert "data is not given" in refused(capsys, "--model", bare, "--task", task)
    on_text = ["--model", base, "--data", base.parent / "prepared"]
    assert "was made by `fat5 prepare`" in refused(capsys, *on_text, "--task", "text-to-text")
    assert "prefix: is a key of a task, and denoisers are scored" in refused(capsys, *on_text, "--prefix", "x")
    line = refused(capsys, "--model", runs(task), "--mixture", "ul2")
    assert "mixture: is a key of denoisers, and sequence-classification is scored" in line
    assert "a file is read whole" in refused(capsys, "--model", runs(task), "--data", file, "--split", "test")
    assert "num_beams: must be a whole number" in refused(capsys, "--model", runs(task), "--num_beams", "0")
    assert "max_source_tokens: must be" in refused(capsys, "--model", runs(task), "--max_source_tokens", "0")
    assert "nowhere" in refused(capsys, "--model", runs(task), "--predictions", tmp_path / "nowhere" / "said.jsonl")
    copy = tmp_path / "run"
    shutil.copytree(runs(task), copy)
    recipe = (copy / "config.yaml").read_text()
    for broken in (recipe + "no_such_key: 1\n", "task: 5\n", recipe.replace("stride: 16", "stride: []")):
        (copy / "config.yaml").write_text(broken)
        assert "is not that of a fine-tuning run" in refused(capsys, "--model", copy)


def test_a_fine_tuned_seq2seq_is_scored_by_denoiser_on_prepared_text(runs, base, capsys):
    words = [
        "--model",
        runs("text-to-text"),
        "--data",
        base.parent / "prepared",
        "--max_tokens",
        64,
        "--eval_tokens",
        200,
    ]
    tables = [evaluate(capsys, *words, *more) for more in ((), ("--split", "train"))]
    assert all("unigram entropy" in table for table in tables)
    assert tables[0] != tables[1]
    assert "no split 'test'" in refused(capsys, *words, "--split", "test")


def test_logits_that_are_no_numbers_are_refused(stock, base, files, tmp_path, capsys):
    shutil.copytree(stock / "head", tmp_path / "model")
    model = fat5.FAT5ForSequenceClassification.from_pretrained(tmp_path / "model")
    model.classification_head.out_proj.weight.data.mul_(1e38).mul_(100)
    model.classification_head.out_proj.weight.data.clamp_(-3e38, 3e38)
    model.save_pretrained(tmp_path / "model")
    rows = [{"text": "Le noyau est libre.", "label": 1}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    words = ["--model", tmp_path / "model", "--task", "sequence-classification", "--data", tmp_path / "rows.jsonl"]
    assert "its logits on these examples are nan" in refused(capsys, *words, "--tokenizer", base / "model")


@pytest.mark.parametrize("learned", [True, False])
def test_whether_a_question_may_have_no_answer_is_the_models(base, files, tmp_path, capsys, learned):
    """The training examples decide it, whatever the examples that are scored."""
    rows = [json.loads(line) for line in Path(files["question-answering"]).read_text().splitlines()]
    empty = {"answers": {"text": [], "answer_start": []}}
    kinds = {"with": [row | empty if index % 2 else row for index, row in enumerate(rows)], "without": rows}
    for name, some in kinds.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    train, test = ("with", "without") if learned else ("without", "with")
    run, shape = tmp_path / "run", {"test": [str(tmp_path / f"{test}.jsonl")]}
    made = {"question-answering": str(tmp_path / f"{train}.jsonl")}
    finetune(config(base, made, run, "question-answering", data=shape, steps=40, eval_every=40, optimizer=LEARNING))
    said, out = tmp_path / "said.jsonl", tmp_path / "scores.json"
    evaluate(capsys, "--model", run, "--predictions", said, "--output", out)
    assert said.read_bytes() == (run / "predictions.jsonl").read_bytes()
    same_results(out, run / "results.json")
    some_are_empty = any(row["prediction"] == "" and row["score"] < 0 for row in predictions(run))
    assert some_are_empty == learned
