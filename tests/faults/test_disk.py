"""Fault 4: the disk is full or read-only during a save. Training goes on, tries again, and at last stops loudly."""

import errno

import pytest

from fat5.errors import CheckpointError
from fat5.tasks import pretrain
from fat5.train import verify_checkpoint
from fat5.train.checkpoint import store as checkpoint
from fat5.train.log.metrics import MetricsLog
from fat5.train.step import StepRunner
from made_run import assert_same_run, events, tiny


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "LEAVING_SECONDS", 0.0)


def failing(monkeypatch, fails, code=errno.ENOSPC):
    """Makes the saves numbered in `fails` (from 1) run out of disk in the middle of a file."""
    write, saves = checkpoint.write_checkpoint, 0

    def scarce(target, tensors, documents, facts):
        nonlocal saves
        saves += 1
        if fails(saves):
            monkeypatch.setattr("fat5.train.checkpoint.files.save_file", full)
        try:
            write(target, tensors, documents, facts)
        finally:
            monkeypatch.setattr("fat5.train.checkpoint.files.save_file", save_file)

    from fat5.train.checkpoint.files import save_file

    def full(content, path, metadata):
        path.write_bytes(b"part of a file")
        raise OSError(code, "no more")

    monkeypatch.setattr(checkpoint, "write_checkpoint", scarce)


def test_training_goes_on_and_saves_later(prepared, tmp_path, monkeypatch, capfd):
    pretrain(tiny(prepared, tmp_path / "clean"))
    failing(monkeypatch, lambda save: save in (2, 3))
    pretrain(tiny(prepared, tmp_path / "run"))
    assert_same_run(tmp_path / "clean", tmp_path / "run")
    told = capfd.readouterr().err
    assert told.count("CHECKPOINT NOT SAVED") == 2
    assert "No space left on device" in told
    assert [event["event"] for event in events(tmp_path / "run")].count("warning") == 2


def test_the_reason_of_a_failure_within_safetensors_is_told(prepared, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(content, path, metadata):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("fat5.train.checkpoint.files.save_file", full)
    with pytest.raises(CheckpointError, match=r"5 saves in a row failed \(No space left on device\)"):
        pretrain(tiny(prepared, tmp_path / "run", steps=2))


def test_it_stops_after_five_failures_with_the_last_good_checkpoint(prepared, tmp_path, monkeypatch):
    failing(monkeypatch, lambda save: save > 1, errno.EROFS)
    with pytest.raises(CheckpointError, match=r"5 saves in a row failed \(Read-only file system\)"):
        pretrain(tiny(prepared, tmp_path / "run", steps=30))
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert verify_checkpoint(tmp_path / "run" / "checkpoints" / "step-2")["step"] == 2


def test_the_pause_decides_not_the_schedule(prepared, tmp_path, monkeypatch, capfd):
    """A save falls due at every step, the disk is full for the first three attempts: none comes before its pause."""
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 60.0)
    attempts, now = [], [0.0]
    step_of, start = StepRunner.run, checkpoint.Saver._start

    def run(self, batches, rate):
        now[0] += 10.0
        return step_of(self, batches, rate)

    def noted(self):
        attempts.append(now[0])
        start(self)

    monkeypatch.setattr(StepRunner, "run", run)
    monkeypatch.setattr(checkpoint.Saver, "_start", noted)
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    failing(monkeypatch, lambda save: save <= 3)
    pretrain(tiny(prepared, tmp_path / "run", steps=60, save_every=1, eval_every=60))
    # Failures show with the next step, ten seconds later; then 60, 120 and 240 s pass.
    assert [round(attempt) for attempt in attempts[:5]] == [10, 80, 210, 460, 470]
    assert capfd.readouterr().err.count("CHECKPOINT NOT SAVED") == 3


def test_a_save_that_waits_for_its_pause_is_tried_before_the_run_leaves(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 1e6)
    failing(monkeypatch, lambda save: save == 1)
    pretrain(tiny(prepared, tmp_path / "run", save_every=2))
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-8"]


def test_a_log_that_cannot_be_flushed_is_told_of(tmp_path, monkeypatch):
    def failing_disk(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    told = []
    log = MetricsLog(tmp_path / "metrics.jsonl", told.append)
    log.write({"kind": "train"})
    monkeypatch.setattr("fat5.train.log.metrics.os.fsync", failing_disk)
    log.flush_to_disk()
    assert told == ["metrics.jsonl cannot be written (Input/output error); training goes on"]


def test_a_full_log_disk_does_not_stop_training(prepared, tmp_path, monkeypatch, capfd):
    import builtins

    real = builtins.open

    def scarce(file, mode="r", *args, **kwargs):
        if str(file).endswith("metrics.jsonl") and "a" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, mode, *args, **kwargs)

    monkeypatch.setattr("fat5.train.log.metrics.open", scarce, raising=False)
    summary = pretrain(tiny(prepared, tmp_path / "run"))
    assert summary["steps"] == 8
    assert capfd.readouterr().err.count("metrics.jsonl cannot be written") == 1
