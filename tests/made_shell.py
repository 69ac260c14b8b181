"""`fat5` on the PATH of a shell script: each command runs in a process forked from the test's own, which has imported
the package, so that a script of five commands does not pay for five imports.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect({address!r})
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)])
    socket.send_fds(server, [request.encode()], [0, 1, 2])
    sys.exit(int(server.recv(16)))
"""
LARGEST = 1 << 17
"""Bytes of a request: the words of a command, its folder and its environment."""


@contextlib.contextmanager
def fat5_on_path(seconds: int = 120) -> Iterator[dict[str, str]]:
    """The environment of a script whose `fat5` is served here; a command is ended after `seconds`."""
    folder = Path(tempfile.mkdtemp())
    (folder / "fat5").write_text(CLIENT.format(python=sys.executable, address=str(folder / "socket")))
    (folder / "fat5").chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen()
        server = os.fork()
        if not server:
            _serve(listener, seconds)
    try:
        places = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
        yield os.environ | {"PATH": os.pathsep.join(places)}
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        shutil.rmtree(folder)


def _serve(listener: socket.socket, seconds: int) -> None:
    while True:
        connection, _ = listener.accept()
        if not os.fork():  # a process a connection: the commands of a pipe run at the same time
            request, streams, *_ = socket.recv_fds(connection, LARGEST, 3)
            command = os.fork()
            if not command:
                connection.close()
                listener.close()
                _become(*json.loads(request), streams, seconds)
            for stream in streams:
                os.close(stream)
            code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
            connection.send(str(code if code >= 0 else 128 - code).encode())
            os._exit(0)
        connection.close()


def _become(words: list[str], folder: str, environment: dict[str, str], streams: list[int], seconds: int) -> None:
    from fat5.cli.main import main

    code = 1
    for name in ("multiprocessing.forkserver", "multiprocess.forkserver"):
        if name in sys.modules:  # one that an earlier test started is no child of this process
            server = sys.modules[name]._forkserver
            server._forkserver_pid = server._forkserver_alive_fd = server._forkserver_address = None
    try:
        signal.alarm(seconds)
        os.chdir(folder)
        os.environ.update(environment)
        for number, (stream, mode) in enumerate(zip(streams, "rww", strict=True)):
            os.dup2(stream, number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], open(number, mode, closefd=False))  # noqa: SIM115
        code = main(words)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
