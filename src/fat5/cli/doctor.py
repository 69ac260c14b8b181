"""`fat5 doctor`: checks this machine, and what a run of a given recipe needs."""

import json
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from fat5.cli.parsing import parse
from fat5.cli.recipes import FOLDER, LAUNCH, launch_files, recipe_names
from fat5.errors import ConfigurationError, FAT5Error, check_whole
from fat5.machine import available_cores, available_memory
from fat5.tasks import PretrainConfig, SourceConfig

OK, WARN, BAD = "ok", "warn", "bad"
MOST_DEVICES = 1 << 16
MOST_HOURS = 1e8
MEASURE = "Give --measured a run on one device, or --tokens_per_second"


@dataclass
class DoctorConfig(PretrainConfig):
    """Check this machine, and with --config a recipe: its data, parameters, memory and arithmetic."""

    json_output: bool = False
    """Print one JSON object instead of a table"""
    vocab_size: int = 32768
    """Assumed vocabulary if the data is not prepared yet"""
    devices: int = 1
    """Devices that train together: memory of each, speed and duration are predicted, for what `parallel` says"""
    gpu: str | None = None
    """Plan for this GPU (H200, H100, A100 …) or for a cpu instead of the device of this machine"""
    measured: str | None = None
    """A run on one device, its folder or its metrics.jsonl, whose speed is that of one device; converted by its
    arithmetic if it had another model or other lengths"""
    budget: str | None = None
    """Hours of GPUs to spend (24h, 90m, 3d): says which model to train on how many tokens, and for how many steps"""
    tokens_per_second: float | None = None
    """Speed of one device, assumed in place of a measured one; `fat5 pretrain` shows the real speed"""


@dataclass
class Finding:
    """One line of the report."""

    what: str
    status: str
    found: str
    advice: str = ""
    numbers: dict[str, Any] | None = None
    """The same for programs; only in JSON"""


def main(argv: list[str]) -> int:
    """Prints the report; 0 where nothing is bad, else 2."""
    config = DoctorConfig(**parse(DoctorConfig, argv, "doctor", section="pretrain"))
    if config.tokens_per_second is not None and not config.tokens_per_second > 0:
        raise ConfigurationError(f"{config.tokens_per_second} is not above 0", where="tokens_per_second")
    check_whole(config.devices, "devices", most=MOST_DEVICES)
    hours = None if config.budget is None else _hours(config.budget)
    findings = machine()
    if config.data.sources or any(word.startswith("--config") for word in argv):
        findings += recipe(config)
    if hours is not None:
        findings += advice(config, hours)
    if config.json_output:
        rows = [{key: value for key, value in vars(one).items() if value is not None} for one in findings]
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        show(findings)
    return 2 if any(finding.status == BAD for finding in findings) else 0


def machine() -> list[Finding]:
    """Python, packages, GPUs, memory, disk and compiler of this machine."""
    import torch

    python = sys.version_info
    findings = [
        Finding("Python", OK if python >= (3, 11) else BAD, platform.python_version(), "FAT5 needs 3.11 or newer"),
        Finding("FAT5", OK, version("fat5")),
        Finding("recipes", OK, f"{', '.join(recipe_names())}; to edit one, copy it from {FOLDER}"),
        Finding("launch files", OK, f"{', '.join(launch_files())}; copy one from {LAUNCH}"),
    ]
    for name, least in (("torch", (2, 11)), ("transformers", (5, 17)), ("tokenizers", (0, 22)), ("datatrove", (0, 9))):
        found = _version(name)
        enough = found is not None and tuple(int(part) for part in found.split("+")[0].split(".")[:2]) >= least
        wanted = ".".join(map(str, least))
        findings.append(Finding(name, OK if enough else BAD, found or "not installed", f"{wanted} or newer is needed"))
    triton = _version("triton")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
        advice = "bf16 and the tuned kernels want an A100 or newer"
        findings.append(Finding(f"GPU {index}", OK if gpu.major >= 8 else WARN, found, advice))
    if torch.cuda.is_available():
        advice = "pip install 'fat5[gpu]' for the kernels"
        findings.append(Finding("triton", OK if triton else BAD, triton or "not installed", advice))
    else:
        advice = "fine for the demo; training wants a GPU"
        findings.append(Finding("GPU", WARN, "none: fat5 runs on the CPU here", advice))
        findings.append(Finding("triton", OK, triton or "not installed (needed on a GPU only)"))
    findings.append(Finding("CPU cores", OK, f"{available_cores()}, torch uses {torch.get_num_threads()} threads"))
    for what, free, little, where in (
        ("memory", available_memory(), 4, "free"),
        ("disk", shutil.disk_usage(".").free, 10, "free here"),
    ):
        if free is not None:
            status = OK if free > little * 2**30 else WARN
            findings.append(Finding(what, status, f"{free / 2**30:.0f} GiB {where}", f"{little} GiB is little"))
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    advice = "torch.compile and Triton need one"
    findings.append(Finding("C compiler", OK if compiler else WARN, compiler or "none", advice))
    for name, why in (
        ("tensorboard", "--tensorboard true"),
        ("wandb", "--report_to wandb"),
        ("trackio", "--report_to trackio"),
        ("pytorch-optimizer", "LAMB"),
        ("ray", "--executor ray"),
    ):
        findings.append(Finding(name, OK, _version(name) or f"not installed (needed for {why} only)"))
    return findings


def recipe(config: DoctorConfig) -> list[Finding]:
    """Checks the data and the model of a recipe; counts parameters, memory and arithmetic, and predicts the speed."""
    from fat5.tasks.forecast import PlannedWorld, assumed_tokenizer
    from fat5.tasks.initial import find_initial
    from fat5.tasks.pretraining import Pretraining, name_model
    from fat5.tasks.sizes import configure_model, on_meta, settle
    from fat5.train.config import shard_size

    world = PlannedWorld.of(config.gpu, config.devices)
    findings: list[Finding] = []
    config.output_dir = config.output_dir or "runs/doctor"
    if config.precision == "auto":
        config.precision = world.precision
    try:
        run = settle(config, world)
        info = Pretraining.open(run, world).info
        findings.append(Finding("data", OK, f"{len(config.data.sources)} source(s), vocabulary {info.vocab_size:,}"))
    except FAT5Error as error:
        findings.append(Finding("data", BAD, str(error)))
        config.data.sources = config.data.sources or [SourceConfig("not given")]
        try:
            info = assumed_tokenizer(config.vocab_size)
            run = settle(config, world, info)
        except FAT5Error:
            return findings  # shapes that cannot be have no plan
    try:
        model = on_meta(configure_model(run, info, find_initial(run)))
        shards = shard_size(run, world.launch)
    except FAT5Error as error:
        return [*findings, Finding("model", BAD, str(error))]
    findings.append(Finding("model", OK, f"{name_model(run)}: {model.num_parameters():,} parameters"))
    findings += [_memory_finding(run, model, world, shards, here=config.gpu is None), _work_finding(run, model)]
    return findings + _speed_findings(run, model, world, config.tokens_per_second, config.measured)


def advice(config: DoctorConfig, hours: float) -> list[Finding]:
    """What a budget is best spent on: a line for each model, and the advice."""
    from fat5.tasks.forecast import TOKENS_A_PARAMETER, PlannedWorld, weigh_budget
    from fat5.tasks.sizes import PASSES

    world = PlannedWorld.of(config.gpu, config.devices)
    if config.precision == "auto":
        config.precision = world.precision
    choices = weigh_budget(config, world, hours, config.vocab_size, config.tokens_per_second, config.measured)
    if not choices:
        return [Finding("budget", WARN, f"the speed of {world.name} is not known", MEASURE)]
    findings = []
    for one in choices:
        found = f"{one.tokens / 1e9:,.3g}B tokens of text, {one.ratio:,.1f} a parameter, in {one.steps:,} steps"
        found += "" if one.fits else "; does not fit into the memory"
        numbers = {key: value for key, value in vars(one).items() if key != "speed"}
        findings.append(Finding(one.preset, OK if one.suits else WARN, found, "", numbers | vars(one.speed)))
    fitting = [one for one in choices if one.fits]
    if not fitting:
        return [*findings, Finding("budget", BAD, "none of them fits", "Take another GPU, or --parallel fsdp")]
    best = next((one for one in reversed(fitting) if one.suits), fitting[0])
    text = f"{best.tokens / 1e9:,.3g}B tokens ({PASSES} passes over {best.tokens / PASSES / 1e9:,.3g}B)"
    found = (
        f"{hours:,.4g} hours of {world.name}: {best.preset} for {best.steps:,} steps, on {text}. {TOKENS_A_PARAMETER} "
        f"tokens a parameter would suit {best.optimal / 1e6:,.0f}M parameters. Speed: {best.speed.source}"
    )
    little = "Too little for this model: take a smaller one, by model.overrides" if not best.suits else MEASURE
    status = OK if best.suits and not best.speed.guess else WARN
    return [*findings, Finding("budget", status, found, little, {"preset": best.preset, "hours": hours})]


def _memory_finding(config: PretrainConfig, model: Any, world: Any, shards: int, here: bool) -> Finding:
    from fat5.train.cost.memory import LOWER, TIGHT, check_memory, plan_memory

    plan, free = plan_memory(config, config.data.batch(), model, world), world.free
    numbers = {"devices": world.size, "shards": shards, "bytes": plan.total, "free": free, "fits": True}
    try:
        check_memory(plan, free, host=here)
    except FAT5Error as error:
        return Finding("memory plan", BAD, str(error), numbers=numbers | {"fits": False})
    tight = free is not None and plan.total > TIGHT * free
    found = plan.describe()
    if world.size > 1:
        found += f" on each of {_devices(config, world)}"
    return Finding("memory plan", WARN if tight else OK, found, LOWER, numbers)


def _work_finding(config: PretrainConfig, model: Any) -> Finding:
    from fat5.tasks.forecast import pack_work

    data = config.data
    packs = data.packs_per_step
    flops = pack_work(model.config, data.encoder_tokens, data.decoder_tokens, data.max_tokens) * packs
    tokens = packs * (data.encoder_tokens + data.decoder_tokens)
    whole = flops * config.steps / 1e18
    found = f"{tokens:,} tokens and {flops / 1e12:,.2f} TFLOP a step; {whole:,.3g} EFLOP in {config.steps:,} steps"
    return Finding("work", OK, found)


def _speed_findings(
    config: PretrainConfig, model: Any, world: Any, assumed: float | None, measured: str | None
) -> list[Finding]:
    from fat5.tasks.forecast import predict_speed

    try:
        speed = predict_speed(config, model, world, assumed, measured)
    except FAT5Error as error:
        return [Finding("speed", BAD, str(error))]
    if speed is None:
        return [Finding("speed", WARN, f"not known of {world.name}", MEASURE)] if world.size > 1 else []
    found = f"{speed.hours:,.1f} hours at {speed.tokens_per_second:,.0f} tokens/s"
    if world.size > 1:
        share = speed.tokens_per_second / (speed.single * world.size)
        found += f" on {_devices(config, world)}: {share:.0%} of {world.size} times the {speed.single:,.0f} of one"
    found += f" ({speed.source})"
    if speed.bound:
        found += "; at best: what the devices tell each other is not counted"
    status = WARN if speed.bound or speed.guess else OK
    return [Finding("speed", status, found, MEASURE, vars(speed) | {"devices": world.size})]


def _devices(config: PretrainConfig, world: Any) -> str:
    return f"{world.size} × {world.name}, {config.parallel}"


def show(findings: list[Finding]) -> None:
    """A table with a colour a status; advice only where it is needed."""
    from rich.table import Table

    from fat5.cli.terminal import Console

    colours = {OK: "green", WARN: "yellow", BAD: "red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for column in ("", "", "", ""):
        table.add_column(column, overflow="fold")
    for finding in findings:
        colour = colours[finding.status]
        advice = finding.advice if finding.status != OK else ""
        table.add_row(finding.what, f"[{colour}]{finding.status}[/{colour}]", finding.found.replace("[", r"\["), advice)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return "found" if find_spec(name.replace("-", "_")) else None


def _hours(text: str) -> float:
    """Hours of 24h, 90m, 3d or 24.

    Raises:
        ConfigurationError: another form, nothing, or more than anyone has.
    """
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([mhd]?)", text.strip())
    hours = float(found[1]) * {"m": 1 / 60, "d": 24}.get(found[2], 1) if found else 0
    if not 0 < hours <= MOST_HOURS:
        hint = "Give hours of GPUs, such as 24h, 90m or 3d"
        raise ConfigurationError(f"{text!r} is no number of hours", where="budget", hint=hint)
    return hours
