"""`run(task, world)`: the story of a run, from its first line to the model folder and summary.json."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fat5.errors import CheckpointError, RunDirectoryError
from fat5.files import sweep, write_atomically, write_json
from fat5.train.checkpoint.compare import check_changes
from fat5.train.checkpoint.files import verify_checkpoint
from fat5.train.checkpoint.generators import count_processes, seed_generators
from fat5.train.checkpoint.state import read_trainer_state
from fat5.train.checkpoint.store import Choice
from fat5.train.log.metrics import parts
from fat5.train.log.plots import LivePlot, draw_run
from fat5.train.log.trackers import check_trackers
from fat5.train.run_directory import RunDirectory
from fat5.train.step import StepRunner
from fat5.train.task import Task
from fat5.train.trainer import Trainer
from fat5.train.world import World


def run(task: Task, world: World) -> dict[str, Any]:
    """Trains a model in `config.output_dir`, or continues the run that is there.

    Returns:
        The content of summary.json.

    Raises:
        FAT5Error: something that the user can mend; nothing half-written is left behind.
        RunStopped: a signal stopped the run after its state was saved.
    """
    config, device = task.config, world.device
    check_trackers(config.trackers())
    lines = task.announce(world)
    folder = RunDirectory(config.output_dir)
    held = folder if world.is_main else nullcontext()
    with held, _determinism(config.deterministic and device.type == "cuda"):
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        trainer = new_trainer(task, folder, world)
        if not world.is_main:
            seed_generators(config.seed, 0, world.rank)  # dropout differs from process to process
        for line in [*lines, *trainer.runner.parallel.notes]:
            trainer.display.say(line)
        _continue(trainer)
        if world.is_main:
            write_atomically(folder.config, config.to_yaml())
        trainer.run()
        return _finish(trainer)


def new_trainer(task: Task, folder: RunDirectory, world: World) -> Trainer:
    """The trainer of a run at step 0: model, optimizer and logs."""
    model = task.build_model()
    runner = StepRunner(task.config, model, world, task.objective)
    draw = partial(draw_run, folder.metrics, folder.plot, task.title(model), task.reference)
    return Trainer(task, folder, model, runner, LivePlot(draw))


def _continue(trainer: Trainer) -> None:
    """Restores the checkpoint that `config.resume` asks for, says which and why, and cuts the log to fit."""
    world = trainer.world
    leftovers = [*sweep(trainer.folder.path), *trainer.store.sweep()] if world.is_main else []
    if leftovers:
        trainer.events.write("swept", leftovers=leftovers)
    choice = Choice.of_main(lambda: _choose(trainer), world)
    if choice is None:
        trainer.cut_log(-1)
        trainer.events.write("started", pid=os.getpid())
        return
    before = read_trainer_state(choice.folder)["configuration"]
    warnings = check_changes(before, trainer.identity, choice.folder)
    trainer.restore(choice.folder)
    done = trainer.state.step
    if done > trainer.config.steps:  # there is no evaluation of its weights, and no schedule that made them
        raise CheckpointError(
            f"is of step {done:,}, and the run would end at step {trainer.config.steps:,}",
            where=choice.folder,
            hint=f"Ask for {done:,} steps or more, or start a new run in another output_dir",
        )
    trainer.cut_log(done)
    for refused in choice.refused:
        trainer.display.warn(f"checkpoint passed over: {refused}")
    for warning in warnings:
        trainer.display.warn(warning)
    saved = count_processes(choice.folder)
    if saved != world.size:
        warnings.append(
            f"{saved} process{'es' * (saved > 1)} made the checkpoint, and {world.size} continue: the examples are "
            "the same, and losses equal but for rounding and dropout"
        )
        trainer.display.warn(warnings[-1])
    why = "named by resume" if trainer.config.resume != "auto" else "the newest that verifies"
    trainer.display.say(f"continuing from {choice.folder} ({why})")
    trainer.events.write(
        "resumed", checkpoint=choice.folder.name, why=why, refused=choice.refused, warnings=warnings, pid=os.getpid()
    )


def _choose(trainer: Trainer) -> Choice | None:
    resume, folder = trainer.config.resume, trainer.folder
    if resume == "auto":
        return trainer.store.choose(trainer.config.strict)
    steps = trainer.store.steps()
    if resume == "never":
        if steps or folder.metrics.exists():
            raise RunDirectoryError(
                "holds a run, and resume is never",
                where=folder.path,
                hint="Choose a new output_dir, or set resume to auto",
            )
        return None
    named = Path(resume)
    step = verify_checkpoint(named)["step"]
    if steps and steps[-1] > step:
        raise CheckpointError(
            f"is of step {step}, and {folder.path} has a newer checkpoint of step {steps[-1]}",
            where=named,
            hint="Give a new output_dir, or remove the newer checkpoints",
        )
    return Choice(named)


def _finish(trainer: Trainer) -> dict[str, Any]:
    """The last drawing, the model folder, and summary.json, which is written last."""
    task, state, folder = trainer.task, trainer.state, trainer.folder
    first, last = state.first_evaluation, state.last_evaluation
    if first is None or last is None:
        raise RuntimeError("a run ended without an evaluation")
    summary = {
        "parameters": trainer.model.num_parameters(),
        "steps": state.step,
        "seconds": state.seconds,
        "train_tokens": state.tokens,
        "raw_tokens": state.raw_tokens,
        "tokens_per_second": state.tokens / state.step_seconds,
        "val_loss_first": first["loss"],
        "val_loss_last": last["loss"],
        "val_accuracy_last": last["accuracy"],
        f"val_loss_by_{task.part}": {name: score["loss"] for name, score in parts(last)[1].items()},
        "encoder_fill": state.encoder_tokens / state.encoder_room,
        "decoder_fill": state.decoder_tokens / state.decoder_room,
        "precision": trainer.runner.precision.name,
        "device": str(trainer.runner.device),
        **task.summary(state),
    }
    if trainer.config.use_best:
        trainer.take_best()
    scorer = trainer.scorer().alone()
    if trainer.world.is_main:
        trainer.plot.finish()
        summary |= task.finish(scorer, folder, trainer.display.warn)
        task.export(scorer.model, folder, summary)
        write_json(folder.summary, summary)
        trainer.events.write("finished", step=state.step)
    return trainer.world.broadcast(summary)


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """Deterministic kernels while a run lasts."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
