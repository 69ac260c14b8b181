import pytest

pytest.register_assert_rewrite("made_run")

from made_run import prepared  # noqa: E402

__all__ = ["prepared"]
