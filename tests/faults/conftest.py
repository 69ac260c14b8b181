import shutil

import pytest

pytest.register_assert_rewrite("made_run")

from made_run import command, prepared, tiny  # noqa: E402

__all__ = ["prepared"]


@pytest.fixture(scope="session")
def undisturbed(prepared, tmp_path_factory):
    """A run by the command, eight steps, to which nothing happens; four checkpoints are kept."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    code, error = command(tiny(prepared, run, keep_last=4))
    assert code == 0, error
    return run


@pytest.fixture
def cut_back(undisturbed, tmp_path):
    """A copy of it as if it had been killed after its third checkpoint, of step 6."""
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-8")
    shutil.rmtree(tmp_path / "run" / "model")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _less_around_a_run(monkeypatch):
    """Drawing, samples and the measured peak of the machine have tests of their own; here they only cost."""
    monkeypatch.setattr("fat5.train.run.draw_run", lambda *arguments: None)
    monkeypatch.setattr("fat5.train.trainer.peak_flops", lambda *arguments: 1e12)
    monkeypatch.setattr("fat5.tasks.pretraining.validation_samples", lambda *arguments: [])
