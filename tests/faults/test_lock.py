"""Fault 17: the same run directory started twice; a stale lock; a folder that holds something else."""

import json
import os
import socket
import time

import pytest

from fat5.errors import RunDirectoryError
from fat5.tasks import pretrain
from fat5.train import RunDirectory, run_directory
from made_run import fork, tiny, wait_for_step


def write_lock(folder, **content):
    RunDirectory(folder).mark()
    (folder / "run.lock").write_text(json.dumps({"pid": 1, "host": socket.gethostname(), "started": None} | content))


def test_the_second_exits_and_names_the_first(prepared, tmp_path):
    config = tiny(prepared, tmp_path / "run", steps=100_000, save_every=100_000, eval_every=100_000)
    first = fork(config)
    wait_for_step(tmp_path / "run", 1)
    log_began = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(RunDirectoryError, match=f"in use by process {first.pid} on {socket.gethostname()}"):
        pretrain(config)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes().startswith(log_began)
    first.kill()
    first.communicate()
    with RunDirectory(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / "run.lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / "run.lock").exists()


def test_a_dead_process_holds_nothing(tmp_path):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    write_lock(tmp_path / "run", pid=child)
    with RunDirectory(tmp_path / "run"):
        pass


def test_a_process_number_given_out_again_is_another_process(tmp_path):
    write_lock(tmp_path / "run", pid=os.getppid(), started=1)
    with RunDirectory(tmp_path / "run"):
        pass
    write_lock(tmp_path / "run", pid=os.getppid(), started=run_directory._start_time(os.getppid()))
    with pytest.raises(RunDirectoryError, match="in use"), RunDirectory(tmp_path / "run"):
        pass


def test_a_lock_of_another_host_is_stale_without_heartbeats(tmp_path):
    write_lock(tmp_path / "run", host="elsewhere")
    with pytest.raises(RunDirectoryError, match="on elsewhere"), RunDirectory(tmp_path / "run"):
        pass
    long_ago = time.time() - 2 * run_directory.STALE_SECONDS
    os.utime(tmp_path / "run" / "run.lock", (long_ago, long_ago))
    with RunDirectory(tmp_path / "run"):
        pass


def test_a_running_process_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "HEARTBEAT_SECONDS", 0.01)
    with RunDirectory(tmp_path / "run"):
        lock = tmp_path / "run" / "run.lock"
        os.utime(lock, (0, 0))
        deadline = time.monotonic() + 10
        while lock.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lock.stat().st_mtime > 0


DAMAGED = [
    "",
    "{",
    "[]",
    "[" * 100_000,
    "\xff",
    *(f'{{"pid": {pid}}}' for pid in ('"x"', 10**30, 1 << 31, -1, 0, "true")),
]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: content[:20])
def test_a_damaged_lock_is_stale(tmp_path, content):
    if content.startswith('{"pid"'):
        content = content.replace("}", f', "host": "{socket.gethostname()}"}}')
    RunDirectory(tmp_path / "run").mark()
    (tmp_path / "run" / "run.lock").write_text(content, encoding="latin-1")
    with RunDirectory(tmp_path / "run"):
        pass


def test_a_folder_that_holds_something_else_is_refused_untouched(prepared, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(RunDirectoryError, match=r"holds something that is not a FAT5 run \(thesis\.tex\)"):
        pretrain(tiny(prepared, tmp_path / "home"))
    assert os.listdir(tmp_path / "home") == ["thesis.tex"]


def test_a_file_in_its_place_is_refused(prepared, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot be made or written"):
        pretrain(tiny(prepared, tmp_path / "file" / "run"))


def test_a_folder_whose_mark_was_being_written_is_taken(prepared, tmp_path):
    """Killed in its first moment: the hidden rest of run.json is no other content, and goes."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.123.partial").write_text('{"form')
    pretrain(tiny(prepared, tmp_path / "run", steps=1))
    assert ".run.json.123.partial" not in os.listdir(tmp_path / "run")
