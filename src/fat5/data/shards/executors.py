"""Running the stages of a plan with datatrove's executors: local processes, Slurm job arrays, Ray.

The process that runs a task makes it from the folder's plan, so nothing is pickled to disk. datatrove marks finished
tasks in `logs/STAGE/completions/`, so an interrupted run continues with the others. Logs go to `logs/STAGE/logs/`,
never to the terminal.
"""

import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor, launch_slurm_job
from loguru import logger

from fat5.data.config import SlurmOptions
from fat5.data.shards.pipeline import Stage, build, stages
from fat5.data.shards.plan import LOGS, read_plan
from fat5.data.shards.prepare import finish
from fat5.data.worker_process import end_with_parent
from fat5.errors import ConfigurationError, DataError


def run_local(folder: str, workers: int) -> None:
    """Runs all stages here, in up to `workers` processes; DataError if the corpus cannot be read, or a process died."""
    for stage in stages(read_plan(folder)):
        ranks = _executor(folder, stage).get_incomplete_ranks()
        shutil.rmtree(Path(folder, LOGS, "progress"), ignore_errors=True)
        if min(workers, len(ranks)) > 1:
            _run_in_pool(folder, stage, ranks, workers)
        else:
            # One task at a time: the tokenizer's own threads use the other cores.
            for rank in ranks:
                run_task(folder, stage.name, rank)


def run_task(folder: str, stage_name: str, rank: int) -> None:
    """Runs one task in this process, and marks it as completed."""
    stage = _stage(folder, stage_name)
    with quiet():
        _executor(folder, stage, build(folder, stage_name))._run_for_rank(rank, local_rank=1)


def run_ray(folder: str, workers: int) -> None:
    """Runs all stages on the Ray cluster at `RAY_ADDRESS`, or one started here; DataError names the log of a fault."""
    try:
        import ray
    except ImportError as error:
        raise ConfigurationError("Ray is not installed", hint="`pip install ray`, or use --executor local") from error
    from datatrove.executor.ray import RayPipelineExecutor

    started = not ray.is_initialized()
    if started:
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level=logging.ERROR)
    try:
        for stage in stages(read_plan(folder)):
            shutil.rmtree(Path(folder, LOGS, "progress"), ignore_errors=True)
            with quiet():
                executor = RayPipelineExecutor(
                    pipeline=build(folder, stage.name),
                    tasks=stage.tasks,
                    workers=workers,
                    logging_dir=_logs(folder, stage),
                    mem_per_cpu_gb=1,
                )
                executor.run()
            left = _executor(folder, stage).get_incomplete_ranks()
            if left:
                log = Path(_logs(folder, stage)) / "logs" / f"task_{left[0]:05d}.log"
                raise DataError(f"tasks failed on Ray: {len(left)}", where=log, hint="The log says why")
    finally:
        if started:
            ray.shutdown()


class SlurmStage(SlurmPipelineExecutor):
    """datatrove's Slurm executor; its jobs make their task from the plan instead of loading a pickle."""

    def __init__(self, folder: str, stage: Stage, options: SlurmOptions, workers: int, pipeline: list[Any]) -> None:
        super().__init__(
            pipeline=pipeline,
            tasks=stage.tasks,
            time=options.time,
            partition=options.partition,
            qos=options.qos,
            mem_per_cpu_gb=options.memory_gb,
            workers=workers,
            job_name=f"fat5-{stage.name}",
            env_command=options.environment or None,
            max_array_size=options.max_array_size,
            logging_dir=_logs(folder, stage),
        )
        self.folder, self.stage = folder, stage

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """datatrove's directives, with paths quoted: Slurm divides them at spaces."""
        arguments = super().get_sbatch_args(max_array)
        return arguments | {key: shlex.quote(arguments[key]) for key in ("output", "error")}

    def submit(self, after: str | None) -> str | None:
        """Submits the unfinished tasks after job `after`; returns the last job's id (`after` if all are finished)."""
        ranks = self.get_incomplete_ranks()
        if not ranks:
            return after
        with self.logging_dir.open("ranks_to_run.json", "w") as file:
            json.dump(ranks, file)
        command = f"srun -l -n 1 {_command(self.folder, self.stage.name)}"
        arguments = self.get_sbatch_args(min(len(ranks), self.max_array_size))
        text = self.get_launch_file_contents(arguments, command)
        with self.logging_dir.open("launch_script.slurm", "w") as file:
            file.write(text)
        for offset in range(-(-len(ranks) // self.max_array_size)):
            dependency = [f"--dependency=afterok:{after}"] if after else []
            after = launch_slurm_job(text, self.job_id_retriever, f"--export=ALL,RUN_OFFSET={offset}", *dependency)
        return after


def submit_slurm(folder: str, workers: int, options: SlurmOptions) -> str:
    """Submits a job array per stage, in order, and a last job that writes the manifest; returns the last job's id."""
    if not options.partition:
        raise ConfigurationError("no Slurm partition", hint="Name one with --slurm.partition")
    after: str | None = None
    try:
        with quiet():
            for stage in stages(read_plan(folder)):
                after = SlurmStage(folder, stage, options, workers, []).submit(after)
            last = SlurmStage(folder, Stage("finish", 1), options, 1, [])
            arguments = {key: value for key, value in last.get_sbatch_args().items() if key != "array"}
            dependency = [f"--dependency=afterok:{after}"] if after else []
            text = last.get_launch_file_contents(arguments, _command(folder, last.stage.name))
            return str(launch_slurm_job(text, last.job_id_retriever, *dependency))
    except FileNotFoundError as error:
        raise ConfigurationError("no sbatch on this machine", hint="Run it on a Slurm login node") from error
    except subprocess.CalledProcessError as error:
        raise ConfigurationError(f"sbatch refused the job (exit {error.returncode})", where=folder) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps datatrove's log off the terminal; datatrove logs to the `sys.stderr` of the moment."""
    logger.remove()
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        try:
            yield
        finally:
            logger.remove()


def main(argv: list[str]) -> int:
    """The command of a Slurm job: `python -m fat5.data.shards.executors FOLDER STAGE`."""
    folder, stage_name = argv
    if stage_name == "finish":
        finish(Path(folder))
        return 0
    stage = _stage(folder, stage_name)
    options = SlurmOptions(max_array_size=int(os.environ["SLURM_ARRAY_TASK_MAX"]) + 1)
    SlurmStage(folder, stage, options, -1, build(folder, stage_name)).run()
    return 0


def _command(folder: str, stage_name: str) -> str:
    return shlex.join([sys.executable, "-m", "fat5.data.shards.executors", folder, stage_name])


def _stage(folder: str, name: str) -> Stage:
    return next(stage for stage in stages(read_plan(folder)) if stage.name == name)


def _run_in_pool(folder: str, stage: Stage, ranks: list[int], workers: int) -> None:
    processes = min(workers, len(ranks))
    threads = max(1, workers // processes)
    pool = ProcessPoolExecutor(processes, get_context("forkserver"), initializer=_start_worker, initargs=(threads,))
    try:
        futures = [pool.submit(run_task, folder, stage.name, rank) for rank in ranks]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except KeyboardInterrupt:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died; memory may have run out",
            where=_logs(folder, stage),
            hint="Run the same command again to continue; fewer --workers need less memory",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(threads: int) -> None:
    """A worker tokenizes on its own cores, ends on Ctrl-C, and does not outlive its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()


def _executor(folder: str, stage: Stage, pipeline: list[Any] | None = None) -> LocalPipelineExecutor:
    return LocalPipelineExecutor(
        pipeline=pipeline or [], tasks=stage.tasks, workers=1, logging_dir=_logs(folder, stage)
    )


def _logs(folder: str, stage: Stage) -> str:
    return f"{folder}/{LOGS}/{stage.name}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
