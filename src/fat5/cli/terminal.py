"""A rich console that leaves a broken pipe to `fat5.cli.main`, as print does."""

from typing import NoReturn

from rich import console


class Console(console.Console):
    """rich would end the process with exit code 1 when the reader closes the pipe."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError
