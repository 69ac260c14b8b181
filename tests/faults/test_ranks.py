"""Faults 3 and 10 under torchrun: a signal to one rank saves and ends all; a rank that dies ends all, and a restart
continues exactly.
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from fat5.tasks import pretrain
from fat5.train import RunStopped, verify_checkpoint
from fat5.train.checkpoint.generators import count_processes
from fat5.train.signals import StopRequest
from made_ranks import finish, forked, pid_of_rank, rank, torchrun
from made_run import assert_same_run, events, last_checkpoint, rows_without_times, tiny, wait_for_step

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="waits for torch.distributed")

SECONDS_TO_LEAVE = 60.0


def write(config) -> str:
    path = Path(config.output_dir).with_suffix(".yaml")
    path.write_text(config.to_yaml())
    return str(path)


def test_a_signal_to_one_rank_saves_and_ends_all(prepared, tmp_path):
    run = tmp_path / "run"
    process = torchrun("pretrain", "--config", write(tiny(prepared, run, steps=100_000, save_every=100_000)))
    wait_for_step(run, 2, 240)
    os.kill(pid_of_rank(process.pid, 1), signal.SIGTERM)
    began = time.monotonic()
    code, output, error = finish(process, SECONDS_TO_LEAVE)
    assert code != 0
    assert time.monotonic() - began < SECONDS_TO_LEAVE
    step = verify_checkpoint(last_checkpoint(run))["step"]
    assert error.count(f"fat5 pretrain: stopped by SIGTERM after step {step}; the same command continues") == 1
    assert (step, output) == (rows_without_times(run)[-1]["step"], "")
    assert count_processes(last_checkpoint(run)) == 2
    assert not (run / "run.lock").exists()


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_torchruns_restart_continues_exactly(prepared, tmp_path):
    settings = {"steps": 40, "save_every": 5, "eval_every": 20}
    code, _, error = finish(torchrun("pretrain", "--config", write(tiny(prepared, tmp_path / "clean", **settings))))
    assert code == 0, error
    run = tmp_path / "run"
    process = torchrun("pretrain", "--config", write(tiny(prepared, run, **settings)))
    wait_for_step(run, 7, 240)
    os.kill(pid_of_rank(process.pid, 1), signal.SIGKILL)
    code, _, error = finish(process, SECONDS_TO_LEAVE)
    assert code != 0
    assert "another process of this run has ended" in error
    # The same command again, with a launcher that restarts all when rank 0 dies.
    process = torchrun("pretrain", "--config", write(tiny(prepared, run, **settings)), options=("--max-restarts", "1"))
    wait_for_step(run, max(row["step"] for row in rows_without_times(run)) + 7, 240)
    os.kill(pid_of_rank(process.pid, 0), signal.SIGKILL)
    code, _, error = finish(process)
    assert code == 0, error
    assert_same_run(tmp_path / "clean", run)
    assert [event["event"] for event in events(run)].count("resumed") == 2


def test_what_only_one_rank_meets_is_told_by_that_rank(prepared, tmp_path, capfd):
    """Rank 1 cannot read its data: both end with code 2."""
    from fat5.cli.main import main
    from fat5.data import PackedLoader
    from fat5.errors import DataError

    recipe = write(tiny(prepared, tmp_path / "run"))

    def work():
        def broken(self):
            if rank() == 1:
                raise DataError("is damaged", where="shard 3")
            return load(self)

        load = PackedLoader.__iter__
        PackedLoader.__iter__ = broken
        assert main(["pretrain", "--config", recipe]) == 2

    began = time.monotonic()
    assert forked(work) == [0, 0]
    assert time.monotonic() - began < SECONDS_TO_LEAVE
    error = capfd.readouterr().err
    assert "fat5 pretrain, rank 1: shard 3: is damaged" in error
    assert "fat5 pretrain: another process of this run has ended" in error
    assert "Traceback" not in error


def test_a_signal_while_the_main_process_works_alone(prepared, tmp_path):
    """It ends the work at once, and all save and leave."""
    from fat5.tasks.pretraining import Pretraining

    config, done = tiny(prepared, tmp_path / "run"), tmp_path / "done"

    def work():
        evaluate = Pretraining.evaluate

        def slowly(self, scorer):
            def alone(own):
                for turn in range(3):
                    own.before_batch()
                    if scorer.world.is_main and turn == 0:
                        os.kill(os.getpid(), signal.SIGTERM)
                    (done.parent / f"turn-{turn}").touch()
                return {}

            return evaluate(self, scorer) | scorer.on_main(alone)

        Pretraining.evaluate = slowly
        with pytest.raises(RunStopped, match="SIGTERM after step 0"):
            pretrain(config)

    assert forked(work) == [0, 0]
    assert [file.name for file in tmp_path.glob("turn-*")] == ["turn-0"]
    assert verify_checkpoint(last_checkpoint(tmp_path / "run"))["step"] == 0


def test_a_signal_that_the_launcher_passes_on_is_no_second_one(monkeypatch):
    """Slurm sends SIGTERM to every process, and torchrun sends it again to its own."""
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with StopRequest(echo=1.0) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.received, left) == (signal.SIGTERM, [])
        os.kill(os.getpid(), signal.SIGINT)
        assert left == [128 + signal.SIGINT]


def test_the_folder_is_in_use(prepared, tmp_path, capfd):
    """One line, and nobody waits."""
    from fat5.cli.main import main

    config = tiny(prepared, tmp_path / "run")
    recipe = write(config)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"format": "fat5-run", "version": 1}))
    holder = {"pid": os.getpid(), "host": os.uname().nodename, "started": None, "since": "now"}
    (tmp_path / "run" / "run.lock").write_text(json.dumps(holder))

    def work():
        assert main(["pretrain", "--config", recipe]) == 2

    assert forked(work, seconds=60) == [0, 0]
    assert f"in use by process {os.getpid()}" in capfd.readouterr().err
