import pytest

pytest.register_assert_rewrite("made_run")

from made_run import prepared  # noqa: E402

__all__ = ["prepared"]


@pytest.fixture(autouse=True)
def _known_peak(monkeypatch):
    """Measuring the machine's peak has a test of its own; here it only costs."""
    monkeypatch.setattr("fat5.train.trainer.peak_flops", lambda *arguments: 1e12)
