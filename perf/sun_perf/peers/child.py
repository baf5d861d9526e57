"""A peer's server as a child process: started, waited for, frozen while the other side is measured, and stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from sun_client import shm
from sun_client.errors import ServerError
from sun_client.server import why

POLL_S = 0.5
STOP_S = 20.0


class Child:
    """A command in a session of its own, its output in ``log``."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str] | None = None, pipes: bool = False):
        """env: added to our own environment. pipes: its standard input and output are ours to talk over, and the log has its errors only."""
        self.command, self.log = command, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, env={**os.environ, **(env or {})}, stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else file, stderr=file, start_new_session=True, text=True)

    def check(self) -> None:
        """Raise ServerError with the log's end if the process has ended."""
        if self.process.poll() is not None:
            raise ServerError(f"{Path(self.command[0]).name} ended with code {self.process.returncode}; from {self.log}:\n{why(self.log)}")

    def wait_healthy(self, port: int, limit_s: float) -> None:
        """Wait until `/health` answers 200. Raises ServerError if the process ends or ``limit_s`` seconds pass."""
        end = time.monotonic() + limit_s
        while not healthy(port):
            self.check()
            if time.monotonic() > end:
                raise ServerError(f"no answer on port {port} within {limit_s:g} s; from {self.log}:\n{why(self.log)}")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL to whatever of its session still lives."""
        thaw(self.process.pid)
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        _signal(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def freeze(session: int) -> None:
    """Stop every process of a session where it is, so that it takes no CPU time."""
    _signal(session, signal.SIGSTOP)


def thaw(session: int) -> None:
    """Let a frozen session go on."""
    _signal(session, signal.SIGCONT)


def healthy(port: int) -> bool:
    """Whether a server on this port says that it is ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _signal(session: int, number: signal.Signals) -> None:
    for pid in shm.processes(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
