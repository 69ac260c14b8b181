"""Writes the GPU figures of docs/performance.md and its plot from benchmarks/results/h200-*.csv.

    python scripts/update_performance.py

The part between `<!-- NAME:begin … -->` and `<!-- NAME:end -->` is replaced; nothing there is typed by hand. A figure
whose file is not there is said to be not measured, and a target that is missed is said to be missed.
"""

import csv
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
SPLIT = ROOT / "docs" / "images" / "h200-time-split.png"
LOSS = ROOT / "docs" / "images" / "h200-loss.png"

COMPILED = "fat5 compiled"
MIXES = {"512": "512 tokens", "1024": "50 to 1,024"}
MFU_TARGETS = {"fat5-small": 0.42, "fat5-base": 0.48, "fat5-large": 0.54}
SMALL_RATE, STOCK_RATIO, CONTEXT, CONTEXT_MFU = 950e3, 2.4, 65536, 0.40
# What PyTorch may reserve on a card of 80 GB.
CARD_GIB = 79
ATTENTION = {
    "D64 L1024": (350, 360),
    "D64 L4096": (430, 460),
    "D64 L1024 causal": (240, 240),
    "packed D64": (290, 270),
    "D128 L1024": (480, 410),
}
"""Case → TFLOP/s asked of forward and backward with a bias and the gradient of its table."""
REPEATABLE = 0.87
"""Share of the backward's that is asked where dQ is added up in one order."""
ABSENT = "Not measured yet."
DECODING = ("new tokens/s", "tokens equal to hf generate")
CLASSES = [
    "GEMM",
    "attention forward",
    "attention backward",
    "attention bias gradient",
    "attention work list",
    "cross-entropy GEMM",
    "cross-entropy",
    "norm, elementwise (fused)",
    "optimizer",
    "gradient norm and clip",
    "idle",
]
"""In the order of the bars; what else there is goes last, together."""

Figures = dict[tuple[str, str, str], float]


def main() -> None:
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    split = splits()
    if split:
        draw(split)
    print(f"wrote {PAGE.relative_to(ROOT)}")


def render(page: str) -> str:
    """The page with those of the generated parts that it has, made anew from the files."""
    replaced = 0
    parts: dict[str, Callable[[], str]] = {
        "targets": targets,
        "training": training,
        "split": split_table,
        "stock": stock,
        "context": context,
        "attention": attention,
        "encoder": encoder,
        "decoding": decoding,
        "accelerated": accelerated,
        "learning": learning,
        "counters": counters,
        "where": where,
    }
    for name, part in parts.items():
        pattern = rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)"
        content = part()
        page, count = re.subn(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", page, flags=re.DOTALL)
        replaced += count
    if not replaced:
        raise SystemExit("the page has none of the parts that are written from files")
    return page


def targets() -> str:
    """G1 to G6: asked, measured, met or missed."""
    lines = ["| target | asked | measured | |", "|---|---|---|---|"]
    trained, beside, contexts, kernels = figures("profile"), figures("hf"), figures("long"), figures("hopper")
    for case, asked in ATTENTION.items():
        for stage, how, least in (
            ("forward", "fat5 bias", asked[0]),
            ("backward", "fat5 bias any order", asked[1]),
            ("backward", "fat5 bias", REPEATABLE * asked[1]),
        ):
            order = "" if stage == "forward" else ", dQ in any order" if "any" in how else ", repeatable (the default)"
            value = kernels.get((case, how, stage))
            what = f"G1 {case.replace('L', 'L ')}, {stage}{order}, TFLOP/s"
            lines.append(_verdict(what, f"≥ {least:.0f}", value, least, "{:.0f}"))
    for preset, target in MFU_TARGETS.items():
        for mix in MIXES:
            reached = max(
                (value for (case, _, metric), value in trained.items() if (case, metric) == (f"{preset} {mix}", "MFU")),
                default=None,
            )
            lines.append(
                _verdict(f"G2 MFU of {preset}, documents of {MIXES[mix]}", f"≥ {target:.0%}", reached, target, "{:.1%}")
            )
    for mix in MIXES:
        rate = trained.get((f"fat5-small {mix}", COMPILED, "useful tokens/s"))
        lines.append(
            _verdict(f"G2 tokens/s of fat5-small, documents of {MIXES[mix]}", "≥ 950k", rate, SMALL_RATE, "{:,.0f}")
        )
    ratios = [value for (case, _, metric), value in beside.items() if metric == "speed-up" and "base" in case]
    lines.append(
        _verdict(
            "G3 over stock T5 compiled, base, 512 tokens", "≥ 2.4×", min(ratios, default=None), STOCK_RATIO, "{:.2f}×"
        )
    )
    lengths = [_length(case) for case, _, metric in contexts if metric == "useful tokens/s" and "base" in case]
    longest = max(lengths, default=None)
    lines.append(_verdict("G4 longest context of base, tokens", "≥ 65,536", longest, CONTEXT, "{:,.0f}"))
    of_base = {key: value for key, value in contexts.items() if key[0].startswith("fat5-base context")}
    at_context = [value for (case, _, what), value in of_base.items() if what == "MFU" and _length(case) == CONTEXT]
    best = max(at_context, default=None)
    lines.append(_verdict("G4 MFU of base at 65,536 tokens", "≥ 40%", best, CONTEXT_MFU, "{:.1%}"))
    fitting = [
        _length(case) for (case, _, what), value in of_base.items() if what == "peak memory" and value <= CARD_GIB
    ]
    longest = max(fitting, default=None)
    lines.append(_verdict("G4 longest context of base on an 80 GB card", "≥ 131,072", longest, 2 * CONTEXT, "{:,.0f}"))
    lines += _of_stock_models()
    return "\n".join(lines)


def _of_stock_models() -> list[str]:
    """G5 and G6, beside stock models in the same run."""
    found, prompts = figures("stock"), figures("encoder")

    def ratio(case: str, figures: Figures, metric: str, ours: str, theirs: str) -> float | None:
        mine, stock = (figures.get((case, how, metric)) for how in (ours, theirs))
        return mine / stock if mine and stock else None

    static = "hf generate, static cache, compiled"
    graphs = "fat5, CUDA graphs" if any(how == "fat5, CUDA graphs" for _, how, _ in prompts) else "fat5"
    train = (found, "useful tokens/s", "fat5", "hf sdpa")
    decode = (found, "new tokens/s", "fat5 decoding, CUDA graph", static)
    prompt = (prompts, "useful tokens/s", graphs, "hf sdpa")
    rows = [
        ("G5 accelerate, training, 32 × 512 without padding", 1.3, ratio("fat5-base 32x512", *train)),
        ("G5 the same, both compiled", 1.5, ratio("fat5-base 32x512 compiled", *train)),
        (f"G5 umT5-XXL encoder, one prompt of 512 ({graphs})", 2.0, ratio("umt5-xxl encoder 1x512", *prompt)),
        ("G6 greedy, over the compiled static cache", 2.0, ratio("fat5-base greedy 8x128", *decode)),
        ("G6 4 beams, over the static cache", 3.0, ratio("fat5-base beams 4 8x128", *decode)),
    ]
    return [_verdict(what, f"≥ {asked:g}×", value, asked, "{:.2f}×") for what, asked, value in rows]


def training() -> str:
    """Tokens/s, MFU, step, host, memory and first step of every case and provider."""
    found = figures("profile")
    if not found:
        return ABSENT
    lines = [
        "| case | how | tokens/s | MFU | step, ms | host busy, ms | peak, GiB | first step, s |",
        "|---|---|" + "---|" * 6,
    ]
    first = {(case.split()[0], how): value for (case, how, metric), value in found.items() if metric == "first step"}
    for case, how in _cases(found, "MFU"):
        rate, mfu, step, host, memory = (
            found[case, how, metric] for metric in ("useful tokens/s", "MFU", "step", "host busy", "peak memory")
        )
        lines.append(
            f"| {case} | {how} | {rate:,.0f} | {mfu:.1%} | {step * 1e3:.1f} | {host * 1e3:.1f} | {memory:.1f} "
            f"| {first.get((case.split()[0], how), float('nan')):.0f} |"
        )
    return "\n".join(lines)


def splits() -> dict[str, dict[str, float]]:
    """Case → class → seconds of the compiled step."""
    found: dict[str, dict[str, float]] = {}
    for (case, how, metric), value in figures("profile").items():
        if how == COMPILED and metric.startswith("time in "):
            kind = metric.removeprefix("time in ")
            own = found.setdefault(case, {})
            kind = kind if kind in CLASSES else "other"
            own[kind] = own.get(kind, 0.0) + value
    return found


def split_table() -> str:
    """Milliseconds by class."""
    split = splits()
    if not split:
        return ABSENT
    lines = [f"| class, ms of a step | {' | '.join(split)} |", "|---" * (len(split) + 1) + "|"]
    for kind in [*CLASSES, "other"]:
        if any(kind in own for own in split.values()):
            cells = [
                f"{own.get(kind, 0) * 1e3:.1f} ({own.get(kind, 0) / sum(own.values()):.0%})" for own in split.values()
            ]
            lines.append(f"| {kind} | {' | '.join(cells)} |")
    alone = {case: value for (case, _, of), value in figures("profile").items() if of == "matrix products of a step"}
    if alone:
        each = ", ".join(f"{preset} {value * 1e3:.1f} ms" for preset, value in alone.items())
        lines += ["", f"The same matrix products one by one, without anything between them: {each}."]
    return "\n".join([*lines, "", f"![Share of a step by class](images/{SPLIT.name})"])


def draw(split: dict[str, dict[str, float]]) -> None:
    """One bar a case, its classes stacked as shares of the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 0.6 * len(split) + 2.2))
    left = [0.0] * len(split)
    colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for index, kind in enumerate([*CLASSES, "other"]):
        shares = [100 * own.get(kind, 0.0) / sum(own.values()) for own in split.values()]
        if any(shares):
            axes.barh(list(split), shares, left=left, label=kind, color=colours[index], height=0.7)
            left = [a + b for a, b in zip(left, shares)]
    axes.invert_yaxis()
    axes.set_xlabel("share of a training step, %")
    axes.set_xlim(0, 100)
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.6 / len(split) - 0.08), frameon=False, fontsize=8)
    figure.savefig(SPLIT, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def stock() -> str:
    """Ours beside stock T5 on the same examples."""
    found = figures("hf")
    if not found:
        return ABSENT
    lines = ["| case | how | useful tokens/s |", "|---|---|---|"]
    lines += [
        f"| {c} | {how} | {found[c, how, 'useful tokens/s']:,.0f} |" for c, how in _cases(found, "useful tokens/s")
    ]
    lines += [f"| {c} | {how} | **{found[c, how, 'speed-up']:.2f}×** |" for c, how in _cases(found, "speed-up")]
    return "\n".join(lines)


def context() -> str:
    """The longest documents."""
    found = figures("long")
    if not found:
        return ABSENT
    lines = ["| one document of | how | tokens/s | MFU | peak, GiB | planned, GiB |", "|---|---|---|---|---|---|"]
    for case, how in _cases(found, "MFU"):
        rate, mfu, memory = (found[case, how, metric] for metric in ("useful tokens/s", "MFU", "peak memory"))
        planned = found.get((case, how, "planned memory"))
        cells = [how, f"{rate:,.0f}", f"{mfu:.1%}", f"{memory:.1f}", f"{planned:.1f}" if planned else "–"]
        lines.append(f"| {_length(case):,} + {_length(case):,} tokens | {' | '.join(cells)} |")
    return "\n".join(lines)


def attention() -> str:
    """G1 by case: TFLOP/s with bias, and what it is of the kernel without one and of SDPA."""
    found = figures("attention")
    lines = [
        "| case | forward | backward | of no bias, forward | backward | over SDPA with a learned bias |",
        "|---" * 6 + "|",
    ]
    for case, how in _cases(found, "backward"):
        if how != "fat5 bias":
            continue
        shares = [_share(found, case, stage) for stage in ("forward", "backward")]
        cells = [f"{share:.0%}" if share else "–" for share in shares]
        faster = _over_sdpa(found, case)
        rates = [f"{found[case, how, stage]:.0f}" for stage in ("forward", "backward")]
        lines.append(f"| {case} | {' | '.join([*rates, *cells, f'{faster:.1f}×' if faster else '–'])} |")
    product, copied = (found["ceiling", "torch", what] for what in ("bf16 matrix product", "copy"))
    ceilings = f"Measured in the same run: a matrix product of 8,192³ {product:.0f} TFLOP/s, a copy {copied:.2f} TB/s."
    return "\n".join([*lines, "", ceilings])


def encoder() -> str:
    """An XXL-shaped encoder."""
    found = figures("encoder")
    if not found:
        return ABSENT
    lines = ["| prompts | how | ms | useful tokens/s | differs from stock by |", "|---|---|---|---|---|"]
    for case, how in _cases(found, "time"):
        taken, rate = found[case, how, "time"], found[case, how, "useful tokens/s"]
        error = found[case, how, "difference from hf sdpa"]
        lines.append(f"| {case} | {how} | {taken * 1e3:.2f} | {rate:,.0f} | {error:.1e} |")
    return "\n".join(lines)


def decoding() -> str:
    """Greedy decoding, and beams."""
    found = {key: value for key, value in figures("stock").items() if key[2] in DECODING}
    if not found:
        return ABSENT
    lines = ["| case | how | new tokens/s | tokens as stock's |", "|---|---|---|---|"]
    for case, how in _cases(found, "new tokens/s"):
        same = found[case, how, "tokens equal to hf generate"]
        lines.append(f"| {case} | {how} | {found[case, how, 'new tokens/s']:,.0f} | {same:.1%} |")
    return "\n".join(lines)


def accelerated() -> str:
    """Training steps of a stock model, and after `fat5.accelerate`."""
    found = figures("stock")
    if not found:
        return ABSENT
    lines = [
        "| batch | how | useful tokens/s | host busy, ms | kernels | their time, ms |",
        "|---|---|---|---|---|---|",
    ]
    for case, how in _cases(found, "useful tokens/s"):
        rate, host, kernels, busy = (
            found[case, how, metric]
            for metric in ("useful tokens/s", "host", "kernels of a step", "time of its kernels")
        )
        lines.append(f"| {case} | {how} | {rate:,.0f} | {host * 1e3:.0f} | {kernels:,.0f} | {busy * 1e3:.1f} |")
    return "\n".join(lines)


def learning() -> str:
    """What the runs of `fat5 pretrain` logged."""
    found = figures("pretrain")
    if not found:
        return ABSENT
    lines = ["| run | quantity | value |", "|---|---|---|"]
    lines += [f"| {case} | {metric.replace('_', ' ')} | {value:,.4g} |" for (case, _, metric), value in found.items()]
    return "\n".join([*lines, *(["", f"![Loss of the base preset](images/{LOSS.name})"] if LOSS.exists() else [])])


def counters() -> str:
    """Nsight Compute's figures, a column a kernel."""
    path = RESULTS / "h200-counters.csv"
    if not path.exists():
        return ABSENT
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    heads = list(dict.fromkeys((row["case"], row["kernel"]) for row in rows))
    cells = {(row["case"], row["kernel"], row["metric"]): f"{row['value']} {row['unit']}".strip() for row in rows}
    lines = [f"| | {' | '.join(' '.join(head) for head in heads)} |", "|---" * (len(heads) + 1) + "|"]
    for metric in dict.fromkeys(row["metric"] for row in rows):
        lines.append(f"| {metric} | {' | '.join(cells.get((*head, metric), '') for head in heads)} |")
    return "\n".join(lines)


def where() -> str:
    """Machine, versions and command of each file."""
    lines = []
    for path in sorted(RESULTS.glob("h200-*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            stamp = next(csv.DictReader(file), {})
        if stamp.get("machine"):
            lines.append(
                f"- `{path.name}`: {stamp['machine']}; {stamp['versions']}; {stamp['date']}; `{stamp['command']}`"
            )
    return "\n".join(lines)


def figures(name: str) -> Figures:
    """(case, provider, metric) → median, of one result file; nothing if it is not there."""
    path = RESULTS / f"h200-{name}.csv"
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {(row["case"], row["provider"], row["metric"]): float(row["p50"]) for row in csv.DictReader(file)}


def _cases(found: Figures, metric: str) -> list[tuple[str, str]]:
    return [(case, how) for case, how, of in found if of == metric]


def _share(found: Figures, case: str, stage: str) -> float | None:
    ours, plain = (found.get((case, how, stage)) for how in ("fat5 bias", "fat5 no bias"))
    return ours / plain if ours and plain else None


def _over_sdpa(found: Figures, case: str) -> float | None:
    """Forward and backward together: 4 and 10 operations each, over their rates."""
    times = []
    for how in ("sdpa learned bias", "fat5 bias"):
        forward, backward = (found.get((case, how, stage)) for stage in ("forward", "backward"))
        if not forward or not backward:
            return None
        times.append(4 / forward + 10 / backward)
    return times[0] / times[1]


def _length(case: str) -> int:
    return int(case.split()[-1])


def _verdict(what: str, asked: str, value: float | None, target: float, form: str) -> str:
    if value is None:
        return f"| {what} | {asked} | not measured | |"
    return f"| {what} | {asked} | {form.format(value)} | {'met' if value >= target else '**missed**'} |"


if __name__ == "__main__":
    main()
