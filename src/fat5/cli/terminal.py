"""A rich console whose reader may leave early, like that of any other print."""

from typing import NoReturn

from rich import console


class Console(console.Console):
    """rich's own ends the process with exit code 1 when the pipe breaks; here `fat5.cli.main` decides."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError
