"""Closed or full standard streams, and a full disk: one line with file and remedy, nothing half-written."""

import errno
import os
import subprocess
import sys

import pytest

from fat5.cli.main import main
from fat5.files import naming, whole_folder, write_atomically, write_output

TRAINING = ["--vocab_size", "1024"]


def shell(command):
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True)


def test_closed_stdout_is_said_before_the_work():
    done = shell(f"{sys.executable} -m fat5 --help >&-")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fat5: standard output is closed. Redirect it to a file or to /dev/null\n"


def test_closed_stdin_and_stderr_do_no_harm(tmp_path):
    """Else the first file that is opened would be number 2, and take what libraries print."""
    done = shell(f"{sys.executable} -m fat5 nothing <&- 2>&-")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="waits on a system with /dev/full")
def test_full_stdout():
    done = shell(f"{sys.executable} -m fat5 --help >/dev/full")
    assert done.returncode == 2
    assert done.stderr == (
        "fat5: standard output: No space left on device. Make room, and run the same command again\n"
    )


@pytest.fixture
def full(monkeypatch):
    """Makes every fsync fail as on a full disk; a file system may notice no sooner."""

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fat5.files.os.fsync", fail)


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_a_tokenizer_folder_is_whole_or_absent(tmp_path, capsys, monkeypatch, there):
    (tmp_path / "corpus.txt").write_text("Le noyau est libre.\n" * 50)
    target = tmp_path / "tokenizer"
    if there:
        target.mkdir()
    command = ["tokenizer", str(tmp_path / "corpus.txt"), *TRAINING, "--output_dir", str(target)]
    with monkeypatch.context() as disk:
        disk.setattr("fat5.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        assert main(command) == 2
    assert capsys.readouterr().err.endswith(f"{target}: No space left. Make room, and run the same command again\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt", "tokenizer"][: 1 + there]
    assert main(command) == 0
    names = ["tokenizer.json", "tokenizer_config.json", "training.json"]
    assert sorted(path.name for path in target.iterdir()) == names


def test_a_folder_may_be_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with whole_folder(os.curdir) as folder:
        (folder / "file").write_text("x")
    assert os.listdir() == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path, full):
    (tmp_path / "file").write_text("old")
    for write in (write_atomically, write_output):
        with pytest.raises(OSError, match="No space left") as failure:
            write(tmp_path / "file", "new")
        assert failure.value.filename == str(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_an_output_may_be_a_link_or_a_device(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_output(tmp_path / "link", "é\n")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text(encoding="utf-8") == "é\n"
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE, text=True)
    write_output(tmp_path / "pipe", "x\n")
    assert reader.communicate(timeout=20)[0] == "x\n"


def test_errors_keep_the_name_they_have():
    for name, said in ((None, "outer"), ("inner", "inner")):
        with pytest.raises(OSError, match="No space") as failure, naming("outer"):
            raise OSError(errno.ENOSPC, "No space left on device", name)
        assert failure.value.filename == said


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "Make room"),
        (errno.EIO, "The disk fails"),
        (errno.EROFS, "Choose a folder"),
        (errno.EMFILE, "ulimit"),
    ],
)
def test_each_fault_of_a_disk_has_its_remedy(monkeypatch, capsys, code, remedy):
    def fail(argv):
        raise OSError(code, os.strerror(code), "file")

    monkeypatch.setattr("fat5.cli.plot.main", fail)
    assert main(["plot"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"fat5 plot: file: {os.strerror(code)}. ")
    assert remedy in line
    assert line.count("\n") == 1
