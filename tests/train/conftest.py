import pytest

pytest.register_assert_rewrite("made_run")

from made_run import prepared  # noqa: E402

__all__ = ["prepared"]


@pytest.fixture
def sampled():
    """The test looks at samples."""


@pytest.fixture(autouse=True)
def _less_around_a_run(request, monkeypatch):
    """Drawing, samples and the measured peak of the machine have tests of their own; here they only cost."""
    monkeypatch.setattr("fat5.train.run.draw_run", lambda *arguments: None)
    monkeypatch.setattr("fat5.train.trainer.peak_flops", lambda *arguments: 1e12)
    if "sampled" not in request.fixturenames:
        monkeypatch.setattr("fat5.tasks.pretraining.validation_samples", lambda *arguments: [])
