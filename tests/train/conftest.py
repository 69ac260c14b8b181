import pytest

pytest.register_assert_rewrite("made_run")

from made_run import prepared  # noqa: E402

__all__ = ["prepared"]


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch):
    """The drawing and the measured peak of the machine have tests of their own; here they only cost."""
    monkeypatch.setattr("fat5.train.run.draw_run", lambda *arguments: None)
    monkeypatch.setattr("fat5.train.trainer.peak_flops", lambda *arguments: 1e12)
