"""F1: how fast is fine-tuning beside `Seq2SeqTrainer` and stock T5, and prediction beside stock `generate`? CPU or GPU.

    python benchmarks/finetuning.py [--preset fat5-demo] [--sections training,predict,lora] [--seconds 280]

Sections: `tokenizer` (no more than the preparation), `training`, `predict` (greedy, 4 beams), `lora` (rank 16). With a
compiled stock model: `compiled`, `lora_compiled`, best run alone, since on a GPU both sides of a base model compile for
minutes (`--sections compiled --seconds 560`; if that is too short, with `--compile_stock plain`, `--static_first`).
Both sides have the same weights, examples, precision (what `precision: auto` is there, unless `--precision`
says another), fused AdamW, constant rate, clipping and, on average, examples a step. Ours is the loader and the
StepRunner of `fat5 finetune`. Stock has sdpa, DataCollatorForSeq2Seq (to a multiple of 8 on a GPU) and batches
grouped by length. Whole loops are timed, data included; between rounds of the stock loop ours has its turn. A useful
token is an encoder or a target token that is no padding. Rows are appended to OUTPUT_DIR/finetuning.csv.
A GPU machine can do without orjson if the cache folder comes
along, prepared elsewhere by `--sections tokenizer`.
"""

import argparse
import gzip
import json
import math
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, T5ForConditionalGeneration

import fat5.tasks.finetune.finetuning
import measure
from fat5.data import load_tokenizer, sample_path
from fat5.model import FAT5Config, FAT5ForConditionalGeneration, quiet
from fat5.optim import OptimizerConfig
from fat5.tasks.finetune import adapter
from fat5.tasks.finetune.config import FinetuneConfig, LoraConfig, TaskData
from fat5.tasks.finetune.finetuning import Finetuning
from fat5.tasks.finetune.predicting import write_texts
from fat5.train.evaluation import Scorer
from fat5.train.precision import Precision
from fat5.train.world import World
from finetuning_turns import GPU, WARM_UP, Ours, fresh_peak, in_turns
from gpu_step import DEVICE, free, going_on, say, synchronize, turn

LORA_RANK = 16
TOLERANCE = 1e-4
"""Losses of both models agree to this, relative, before anything is timed: float32, other orders of summation."""
LEARNED = 30
"""Steps that the model has made before it writes texts."""
OURS = "fat5 finetune"
TOY = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "d_kv": 16}
Texts = dict[int, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="fat5-demo", help="fat5-demo, fat5-small or fat5-base")
    parser.add_argument("--sections", default="training,predict,lora", help="which, in order")
    parser.add_argument("--seconds", type=float, default=280.0, help="nothing new starts, and rounds end, after this")
    parser.add_argument("--measured", type=float, default=12.0 if GPU else 50.0, help="seconds of rounds a comparison")
    parser.add_argument("--output_dir", type=Path, default=measure.RESULTS)
    parser.add_argument("--cache", type=Path, help="folder of tokenizer and examples; OUTPUT_DIR/finetuning")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; else one is trained on the sample")
    parser.add_argument("--vocab_size", type=int, help="of that tokenizer; 32,768, and 8,192 for fat5-demo")
    parser.add_argument("--data", help="JSONL of columns source and target; else the English and French sample")
    parser.add_argument("--batch_size", type=int, default=32, help="examples a step")
    parser.add_argument("--dropout", type=float, default=0.1, help="of both models; 0.1 as in every T5 checkpoint")
    parser.add_argument("--compile_stock", choices=("blocks", "whole", "plain"), default="blocks", help=(
        "blocks and whole: by the trainer, block by block or all at once; plain: torch.compile of the model's forward"
    ))  # fmt: skip
    parser.add_argument("--static_first", action="store_true", help="stock compiles dynamic shapes once lengths change")
    parser.add_argument("--examples", type=int, default=128 if GPU else 64, help="predict: how many inputs")
    parser.add_argument("--new_tokens", type=int, default=64, help="predict: most tokens of a text")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of both sides")
    parser.add_argument("--turn", type=Path, help="a file to lock while rounds are timed: others may compile meanwhile")
    parser.add_argument("--toy", action="store_true", help="one small layer and few short examples")
    options = parser.parse_args()
    if options.toy:
        options.batch_size, options.examples, options.new_tokens, options.measured = 8, 12, 8, 0.1
        options.vocab_size = options.vocab_size or 1024
    if options.threads:
        torch.set_num_threads(options.threads)
    say(f"{measure.machine()}, {torch.get_num_threads()} threads, {measure.versions()}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for name in options.sections.split(","):
            if bench.left() < 5:
                say(f"== {name}: not run, out of time")
                continue
            say(f"== {name} ({bench.elapsed():.0f} s)")
            with going_on(out_of_memory=True):
                SECTIONS[name](bench)
            bench.write()
    say(f"after {bench.elapsed():.0f} s")


class Bench:
    """What the sections share: options, examples, a folder with the weights that both sides start from, rows."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.rows: list[dict[str, object]] = []
        self.started = time.perf_counter()
        cache = options.cache or options.output_dir / "finetuning"
        vocabulary = options.vocab_size or (8192 if options.preset == "fat5-demo" else 32768)
        self.data = options.data or str(aligned_sample(cache / "en-fr.jsonl"))
        self.tokenizer = options.tokenizer or cache / f"tokenizer-{vocabulary}"
        if not (self.tokenizer / "tokenizer.json").is_file():
            from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer

            train_tokenizer(TokenizerTraining(["sample:fr", "sample:en"], str(self.tokenizer), vocab_size=vocabulary))

    @cached_property
    def stock_tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.tokenizer)

    @cached_property
    def weights(self) -> Path:
        """A folder with a model of random weights."""
        info = load_tokenizer(self.tokenizer).info
        keys = {"vocab_size": info.vocab_size, "pad_token_id": info.pad_id, "eos_token_id": info.eos_id}
        keys |= {"decoder_start_token_id": info.pad_id, "dropout_rate": self.options.dropout}
        torch.manual_seed(0)
        with torch.device(DEVICE), quiet():
            shape = FAT5Config.preset(self.options.preset, **keys, **(TOY if self.options.toy else {}))
            model = FAT5ForConditionalGeneration(shape)
            model.save_pretrained(self.folder / "model")
        say(f"{self.options.preset}, {model.num_parameters() / 1e6:.1f}M parameters, vocabulary {info.vocab_size:,}")
        return self.folder / "model"

    @cached_property
    def ours(self) -> Ours:
        """Full fine-tuning, from the first section that needs it to the last."""
        return Ours(self.task(rank=0))

    def task(self, rank: int) -> Finetuning:
        """The task of `fat5 finetune`."""
        data = TaskData(train=[self.data], batch_size=self.options.batch_size)
        if self.options.toy:
            data.max_examples, data.max_source_tokens, data.max_target_tokens = 120, 48, 32
        config = FinetuneConfig(
            output_dir="none", model=str(self.weights), tokenizer=str(self.tokenizer), data=data,
            optimizer=OptimizerConfig(name="adamw"), lora=LoraConfig(rank=rank), precision=self.options.precision,
        )  # fmt: skip
        # The metrics' libraries, which nothing here needs, may be missing.
        with patch.object(fat5.tasks.finetune.finetuning, "measure"):
            return Finetuning.open(config, World(DEVICE))

    def stock(self, lora: LoraConfig | None = None) -> Any:
        """Stock T5 with the same weights; with the same adapters if asked for."""
        with quiet():
            model = T5ForConditionalGeneration.from_pretrained(
                self.weights, attn_implementation="sdpa", dtype=torch.float32
            ).to(DEVICE)
        return adapter.add_adapters(model, lora, "ForConditionalGeneration") if lora else model

    def add(self, case: str, provider: str, metric: str, samples: Any, unit: str) -> None:
        """A row, which is printed."""
        values = np.atleast_1d(np.asarray(samples, dtype=float))
        asked = "" if self.options.precision == "auto" else f" {self.options.precision}"
        row = measure.row(f"{self.options.preset}{asked} {case}", provider, metric, values, unit)
        self.rows.append(row)
        spread = f" (p20 {row['p20']:,}, p80 {row['p80']:,}, {len(values)} rounds)" if len(values) > 1 else ""
        say(f"{row['case']} | {provider} | {metric}: {row['p50']:,} {unit}{spread}")

    def write(self) -> None:
        """Appends the rows that are not in the file yet."""
        measure.append(self.options.output_dir / "finetuning.csv", self.rows)
        self.rows = []

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def left(self) -> float:
        return float(self.options.seconds - self.elapsed())


def aligned_sample(path: Path) -> Path:
    """Paragraphs of the sample that are there in English and in French, one pair a line."""
    if not path.is_file():
        texts = {}
        for language in ("en", "fr"):
            with gzip.open(sample_path(language), "rt", encoding="utf-8") as lines:
                texts[language] = {row["id"]: row["text"] for row in map(json.loads, lines)}
        french = texts["fr"]
        pairs = [{"source": text, "target": french[key]} for key, text in texts["en"].items() if key in french]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    return path


def training(bench: Bench, compiled: bool = False) -> None:
    """All weights train."""
    stock = bench.stock()
    check_losses(bench, stock)
    compare(bench, "training", lambda: bench.ours, stock, compiled)


def lora(bench: Bench, compiled: bool = False) -> None:
    """Adapters of rank 16 train, through PEFT on both sides."""
    bench.__dict__.pop("ours", None)
    free()
    task = bench.task(rank=LORA_RANK)
    compare(bench, f"LoRA {LORA_RANK}", lambda: Ours(task), bench.stock(task.config.lora), compiled)


def check_losses(bench: Bench, stock: Any) -> None:
    """Refuses to time two models whose losses differ at the start."""
    examples = bench.task(rank=0).validation.examples
    rows = [{"input_ids": examples.input(n).tolist(), "labels": examples.target(n).tolist()} for n in range(4)]
    inputs = {key: value.to(DEVICE) for key, value in DataCollatorForSeq2Seq(bench.stock_tokenizer)(rows).items()}
    with torch.no_grad(), quiet():
        ours = FAT5ForConditionalGeneration.from_pretrained(bench.weights, dtype=torch.float32).to(DEVICE)
        mine, theirs = (float(model.eval()(**inputs).loss) for model in (ours, stock))
    say(f"losses at the start: {mine:.6f} and {theirs:.6f}")
    if not math.isclose(mine, theirs, rel_tol=TOLERANCE):
        raise RuntimeError("the losses differ: these are not the same model")


def compare(bench: Bench, case: str, make: Callable[[], Ours], stock: Any, compiled: bool) -> None:
    """Useful tokens/s of both loops in turns, their ratio in each pair of rounds, and on a GPU the memory of each."""
    options = bench.options
    stock.to("cpu")  # out of the way while the peak of ours is counted
    base, begun = fresh_peak(), time.perf_counter()
    ours = make()
    if not ours.count["steps"]:
        ours.steps(WARM_UP)
        bench.add(case, OURS, "first steps", time.perf_counter() - begun, "s")
        if GPU:
            bench.add(case, OURS, "peak memory", (torch.cuda.max_memory_reserved() - base) / 2**30, "GiB")
    found = in_turns(
        ours, stock, bench.stock_tokenizer, bench.folder / "trainer",
        compiled=options.compile_stock if compiled else "", dynamic=not options.static_first,
        measured=options.measured, left=bench.left, lock=options.turn,
    )  # fmt: skip
    theirs = "Seq2SeqTrainer sdpa" + (f", torch_compile {options.compile_stock}" if compiled else "")
    bench.add(case, OURS, "useful tokens/s", found.ours, "tokens/s")
    bench.add(case, theirs, "useful tokens/s", found.stock, "tokens/s")
    bench.add(case, f"fat5 / {theirs}", "speed-up", np.divide(found.ours, found.stock), "ratio")
    bench.add(case, OURS, "examples a step", ours.count["examples"] / ours.count["steps"], "examples")
    bench.add(case, OURS, "useful share of its tokens", ours.count["useful"] / ours.count["tokens"], "share")
    bench.add(case, theirs, "useful share of its tokens", found.count["useful"] / found.count["tokens"], "share")
    bench.add(case, theirs, "first steps", found.first_steps, "s")
    if GPU:
        bench.add(case, theirs, "peak memory", found.memory / 2**30, "GiB")


def predict(bench: Bench) -> None:
    """Texts for held-out inputs, long ones first: `write_texts` and stock `generate`, in turns."""
    ours, options = bench.ours, bench.options
    ours.steps(max(0, LEARNED - ours.count["steps"]))
    free(compiled=False)
    models = {"stock generate": bench.stock()}
    if GPU:
        # Without autocast stock has less to do: its best.
        models["stock generate, bf16 weights"] = bench.stock().to(torch.bfloat16)
    for model in models.values():
        model.eval().load_state_dict(ours.model.state_dict())
    ours.model.eval()
    for beams in (1, 4):
        calls: dict[str, Callable[[int], Texts]] = {"fat5 write_texts": partial(write, bench, beams)}
        calls |= {name: partial(generate, bench, model, beams) for name, model in models.items()}
        for call in calls.values():
            call(2)
        case = f"predict {options.new_tokens} tokens, " + ("greedy" if beams == 1 else f"{beams} beams")
        predict_in_turns(bench, case, {name: partial(call, options.new_tokens) for name, call in calls.items()})
    ours.model.train()


def write(bench: Bench, beams: int, new_tokens: int) -> Texts:
    """Texts of ours, by row."""
    task, model = bench.ours.task, bench.ours.model
    scorer = Scorer(model, Precision(task.config.precision, DEVICE), World(DEVICE), model)
    written = write_texts(
        scorer, task.validation.examples, task.tokenizer, rows=asked(bench), batch_size=task.config.predict_batch,
        max_new_tokens=new_tokens, num_beams=beams,
    )  # fmt: skip
    return {row: text for some in written for row, text, _ in some}


@torch.no_grad()
def generate(bench: Bench, model: Any, beams: int, new_tokens: int) -> Texts:
    """Texts of stock generate, by row, in batches by length as ours."""
    task, tokenizer, texts = bench.ours.task, bench.stock_tokenizer, Texts()
    examples, size = task.validation.examples, task.config.predict_batch
    ordered = sorted(asked(bench).tolist(), key=lambda row: -int(examples.input_lengths[row]))
    autocast = Precision(task.config.precision, DEVICE).autocast() if model.dtype == torch.float32 else nullcontext()
    with autocast:
        for start in range(0, len(ordered), size):
            rows = ordered[start : start + size]
            inputs = tokenizer.pad({"input_ids": [examples.input(row).tolist() for row in rows]}, return_tensors="pt")
            ids, mask = inputs["input_ids"].to(DEVICE), inputs["attention_mask"].to(DEVICE)
            how = {"max_new_tokens": new_tokens, "num_beams": beams, "do_sample": False}
            written = model.generate(input_ids=ids, attention_mask=mask, **how)
            decoded = tokenizer.batch_decode(written, skip_special_tokens=True)
            texts |= dict(zip(rows, map(str.strip, decoded), strict=True))
    return texts


def asked(bench: Bench) -> np.ndarray:
    """The rows that are written for."""
    return np.arange(min(bench.options.examples, len(bench.ours.task.validation.examples)))


def predict_in_turns(bench: Bench, case: str, calls: dict[str, Callable[[], Texts]]) -> None:
    """Examples/s of each, and how many texts are as ours, which is the first."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    texts: dict[str, Texts] = {}
    mine = next(iter(calls))
    with turn(bench.options.turn):
        begun = time.perf_counter()
        while len(taken[mine]) < 2 or (time.perf_counter() - begun < bench.options.measured / 2 and bench.left() > 0):
            for name, call in calls.items():
                synchronize()
                start = time.perf_counter()
                texts[name] = call()
                synchronize()
                taken[name].append(time.perf_counter() - start)
    for name, seconds in taken.items():
        bench.add(case, name, "examples/s", len(texts[mine]) / np.array(seconds), "examples/s")
        if name != mine:
            equal = np.mean([texts[name][row] == text for row, text in texts[mine].items()])
            bench.add(case, f"fat5 / {name}", "speed-up", np.divide(seconds, taken[mine]), "ratio")
            bench.add(case, f"fat5 = {name}", "equal texts", equal, "share")


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "tokenizer": lambda bench: None,
    "training": training,
    "compiled": partial(training, compiled=True),
    "predict": predict,
    "lora": lora,
    "lora_compiled": partial(lora, compiled=True),
}

if __name__ == "__main__":
    main()
