"""Processes that are forked from one that has loaded torch, transformers, DeepSpeed and MLflow: ten seconds of CPU.

`python forks.py SOCKET` is that process. It loads them when it is first asked for a process, and ends with its parent.
"""

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

SOCKET = "VILA_TEST_FORKS"
"""Environment variable with the path of the server's socket."""
ENV = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Environment of the server, because libraries read it when they are loaded."""
POLL_SECONDS = 0.5


@contextlib.contextmanager
def serving(address: Path) -> Iterator[None]:
    """Run the server, and set the environment variable by which this process and its children find it."""
    path = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, **ENV, "PYTHONPATH": path}
    with subprocess.Popen([sys.executable, __file__, str(address)], env=env, stdin=subprocess.DEVNULL) as server:
        os.environ[SOCKET] = str(address)
        yield
        server.kill()


class Fork:
    """A process that does what `python ARGUMENTS` does, for a script or `-c` CODE, and writes to a log if there is one.

    It is killed at the end of the context.
    """

    def __init__(self, *arguments: object, log: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        request = {"argv": [*map(str, arguments)], "env": {**os.environ, **(env or {})}, "cwd": os.getcwd()}
        self._socket = _connected(os.environ[SOCKET])
        with open(log or 2, "a", closefd=log is not None) as output:
            socket.send_fds(self._socket, [b"\n"], [output.fileno()])
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._socket.makefile()
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = 1200) -> int:
        """Return the exit code, which is negative for a signal. Raises TimeoutError after some seconds."""
        if self.returncode is None:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise TimeoutError(f"process {self.pid} runs after {timeout} s")
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._socket.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        with contextlib.suppress(TimeoutError):
            return self.wait(0)
        return None

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


@contextlib.contextmanager
def ranks(
    script: Path | str, *arguments: object, world_size: int = 2, logs: Path | None = None
) -> Iterator[list[Fork]]:
    """Processes that run `SCRIPT ARGUMENTS RANK WORLD_SIZE RENDEZVOUS`, with a log LOGS/RANK each."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as living:
        yield [
            living.enter_context(
                Fork(script, *arguments, rank, world_size, f"{folder}/met", log=logs and logs / str(rank))
            )
            for rank in range(world_size)
        ]


def output_of(*arguments: object, env: Mapping[str, str] | None = None) -> list[str]:
    """Return the lines that a process writes, which has to succeed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with Fork(*arguments, log=log, env=env) as process:
            code = process.wait()
        assert code == 0, log.read_text()
        return log.read_text().splitlines()


def _connected(address: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    for _ in range(100):  # the server may not listen yet
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            client.connect(address)
            return client
        time.sleep(0.1)
    raise ConnectionError(f"nothing listens at {address}")


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """Forks a process for each request, the parent of the requested one."""

    max_children = 1000
    request_queue_size = 100
    parent = os.getppid()
    loaded = False

    def process_request(self, request: socket.socket, client_address: object) -> None:
        """Load the libraries at the first request."""
        if not self.loaded:
            _load()
            self.loaded = True
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """End with the parent."""
        super().service_actions()
        if os.getppid() != self.parent:
            os._exit(0)


class Request(socketserver.StreamRequestHandler):
    """Answers with the pid and, at its end, with the exit code. Kills the process if the client is gone."""

    def handle(self) -> None:
        """Run one process."""
        _, (output,), *_ = socket.recv_fds(self.connection, 1, 1)
        request = json.loads(self.rfile.readline())
        if not (pid := os.fork()):
            _run(request, output)
        os.close(output)
        self.wfile.write(f"{pid}\n".encode())
        child = os.pidfd_open(pid)
        if child not in select.select([child, self.connection], [], [])[0]:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _load() -> None:
    import mlflow  # noqa: F401
    import torch

    from vila_ops.train import engine, loop, stage, verify_resume  # noqa: F401 what most scripts import

    torch.set_num_threads(1)
    engine._import_deepspeed()
    gc.freeze()  # DeepSpeed collects garbage ten times for an engine: 0.3 s each with what was loaded


def _run(request: dict[str, Any], output: int) -> NoReturn:
    """Run the script, and end this process."""
    code: object = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.clear()
        os.environ |= {**request["env"], **ENV}
        os.chdir(request["cwd"])
        sys.path[:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        script, *sys.argv = request["argv"]
        if script == "-c":
            exec(compile(sys.argv[0], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
        else:
            sys.argv.insert(0, script)
            sys.path.insert(0, str(Path(script).parent))
            runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 the process ends here after any error
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    Server(sys.argv[1], Request).serve_forever(POLL_SECONDS)
