"""A tritonserver as a child of this process: started, waited for, and stopped without leaving anything behind."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from http.client import HTTPException
from pathlib import Path

from sun import key
from sun.door import VARIABLE as DOOR
from sun.handoff.shm import SERVER as SHM_SERVER
from sun_build.config_file import parameter
from sun_client import shm
from sun_client.control import Control
from sun_client.direct import urlopen
from sun_client.errors import ServerError

HOST = "127.0.0.1"
POLL_S = 0.2
GRACE_S = 30.0
"""For the requests that the router has when the server is to stop."""
DRAIN_S = 60.0
"""All of it: then Triton itself waits up to 30 s (--exit-timeout-secs) if a client holds an idle connection."""
KILL_S = 20.0
"""For a killed process to be gone; one in an uninterruptible wait (a disk that does not answer, a GPU's driver) may never be."""
DYING = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):  # it died before the line above
    sys.exit(1)
for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""See `dying_with_us`. Its arguments: this process, and the command line."""
ERROR = re.compile(r"E\d{4} |error:")
REQUEST_LOG = "SUN_REQUEST_LOG"
"""The environment variable that tells the router where its request log is, unless its configuration does."""
TRACE_HEADERS, KEY_HEADER = "traceparent|tracestate", "authorization"
"""gRPC metadata that become request parameters. Not over HTTP: `generate` of this Triton forwards no headers."""
HARMLESS = ("CudaDriverHelper", "unable to create stream")
"""Error lines of any server without a GPU."""


@dataclass(frozen=True)
class Ports:
    """TCP ports of Triton's three services."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


@dataclass(frozen=True)
class Tls:
    """The server's certificate (with its chain) and private key, PEM files."""

    certificate: Path
    key: Path

    def options(self) -> list[str]:
        """The command line options that make a tritonserver's gRPC encrypted. Raises ServerError naming a file that cannot be read."""
        for name, path in (("tls-cert", self.certificate), ("tls-key", self.key)):
            if not os.access(path, os.R_OK) or not path.is_file():
                raise ServerError(f"{name}: {path} is no file that can be read")
        return ["--grpc-use-ssl=true", f"--grpc-server-cert={self.certificate.absolute()}", f"--grpc-server-key={self.key.absolute()}"]


class Server:
    """A tritonserver for one repository root, as a context manager: ready inside the ``with``, gone after it.

    root: the folder with `model_repository/` and `backends/`. host: the address to listen on. tls: for gRPC; HTTP, which Triton
    does not encrypt, then stays on this machine, for a proxy.
    Start it from the main thread: when the thread that started it ends, however it ends, the server is told to stop.
    """

    def __init__(self, root: Path, ports: Ports = Ports(), host: str = HOST, tls: Tls | None = None):
        self.root, self.ports, self.host, self.tls = Path(root).absolute(), ports, host, tls
        self.http_host = HOST if tls else host
        # A server on other ports, of a test say, must not write into the log of the one that runs already.
        suffix = "" if ports == Ports() else f"-{ports.http}"
        self.log = self.root / ".run" / f"tritonserver{suffix}.log"
        self.earlier_log = self.log.with_name(f"{self.log.name}.1")
        self.request_log = self.root / ".run" / f"requests{suffix}.jsonl"
        self._control = self.root / ".run" / f"control{suffix}.json"
        self._key, self._door, self._shm = secrets.token_hex(16), secrets.token_hex(16), secrets.token_hex(8)
        self._process: subprocess.Popen | None = None
        self._files: set[str] = set()

    @property
    def pid(self) -> int | None:
        """The server's pid, which is also its session's and process group's; None before the start."""
        return self._process.pid if self._process else None

    @property
    def control(self) -> Control:
        """Control of its models."""
        return Control(self.pid, self.http_host, self.ports.http, self._key)

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def keys_needed(self) -> bool:
        """Whether its repository is configured for inference keys."""
        return bool(parameter(self.root / "model_repository", "sun", "keys"))

    @property
    def environment(self) -> dict[str, str]:
        """The process's environment: ours, and what its models are to know."""
        return {**os.environ, key.VARIABLE: self._key, SHM_SERVER: self._shm, REQUEST_LOG: str(self.request_log), **({DOOR: self._door} if self.keys_needed else {})}

    @property
    def command(self) -> list[str]:
        """The command line."""
        return [
            str(Path(sys.prefix) / "bin" / "tritonserver"),
            f"--model-repository={self.root / 'model_repository'}", f"--backend-directory={self.root / 'backends'}",
            f"--http-address={self.http_host}", f"--http-port={self.ports.http}",
            f"--grpc-address={self.host}", f"--grpc-port={self.ports.grpc}",
            f"--metrics-address={self.host}", f"--metrics-port={self.ports.metrics}",
            "--allow-gpu-metrics=false",
            # All models, as without these two; but one can be loaded anew when its process died.
            "--model-control-mode=explicit", "--load-model=*", *Control.options(self._key),
            *(self.tls.options() if self.tls else []),
            f"--grpc-header-forward-pattern=^({TRACE_HEADERS}{f'|{KEY_HEADER}' if self.keys_needed else ''})$",
        ]

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self, waiting: Callable[[float], None] = lambda seconds: None) -> None:
        """Start and wait until every model is ready. ``waiting(seconds so far)`` is called a few times a second.

        Raises ServerError at once if a port is taken or the process ends; there is no timeout, as long as it lives it loads.
        """
        if not os.access(self.command[0], os.X_OK):
            raise ServerError(f"{self.command[0]} is missing: run `sun setup` first")
        for folder in ("model_repository", "backends"):
            if not (self.root / folder).is_dir():
                raise ServerError(f"{self.root} has no folder {folder}")
        for port in astuple(self.ports):
            check_free(self.host, port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # the first start; or a full disk
            os.replace(self.log, self.earlier_log)
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C in a terminal reaches only us, and its processes can be told from all others.
            # A folder without Python files: the backends' stubs import from the working directory first.
            self._process = subprocess.Popen(
                dying_with_us(self.command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                cwd=self.log.parent, env=self.environment)
        try:
            self._wait_ready(waiting)
        except BaseException:
            self.stop(drain_s=0 if self._process.poll() is not None else DRAIN_S)
            raise
        with contextlib.suppress(OSError):  # a full disk; see `warnings`
            self.control.write(self._control)

    def warnings(self) -> Iterator[str]:
        """What a running server has to do without."""
        if not self._control.exists():
            yield f"{self._control} could not be written: this server's tasks and workers cannot be changed until it is started anew"

    def poll(self) -> None:
        """Raise ServerError with the log's end if the server has ended."""
        code = self._process.poll()
        if code is not None:
            ended = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise ServerError(f"tritonserver {ended}; from {self.log}:\n{why(self.log)}")

    def stop(self, drain_s: float = DRAIN_S) -> None:
        """Stop: no more requests, `GRACE_S` for those that there are, SIGTERM, and after ``drain_s`` in all SIGKILL to whatever still lives; sweep its shared memory.

        An interrupt (Ctrl-C) while it drains ends the wait. Does nothing if it was not started or is gone.
        """
        if self._process is None:
            return
        try:
            self.remember()
            if self._process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                    until = time.monotonic() + drain_s
                    self._drain(min(drain_s, GRACE_S))
                    self._process.terminate()
                    self._process.wait(max(0.0, until - time.monotonic()))
        finally:
            self._control.unlink(missing_ok=True)
            self._kill()
            shm.sweep(self._files)
            _sweep_tickets(self._shm)

    def _drain(self, grace_s: float) -> None:
        """Let the router's requests end. Not left to Triton: told to stop, it takes the models away from what waits or is prefilled."""
        until = time.monotonic() + grace_s
        with contextlib.suppress(ServerError):  # there is no router, or it is not up to it
            while time.monotonic() < until and self.running and self.control.leave():
                time.sleep(POLL_S)

    def remember(self) -> None:
        """Note which files of shared memory its processes have, so that `stop` can sweep those of the ones that die, and keep others from reading them."""
        files = shm.session_files(self.pid)
        shm.keep_private(files)
        self._files |= files

    def leftovers(self) -> list[str]:
        """What is left of a stopped server, each as a phrase: living processes and shared memory. Empty is how it should be."""
        left = [f"process {pid}" for pid in shm.processes(self.pid)] if self.pid else []
        return left + [f"/dev/shm/{name}" for name in sorted(shm.remaining(self._files))]

    def _wait_ready(self, waiting: Callable[[float], None]) -> None:
        started = time.monotonic()
        while True:
            self.poll()
            done = ready(self.http_host, self.ports.http)
            self.remember()  # after that, so that no model that is ready has been missed
            if done:
                return
            waiting(time.monotonic() - started)
            time.sleep(POLL_S)

    def _kill(self) -> None:
        """SIGKILL all that lives of the server's session, and wait until it is gone; `leftovers` names what the kernel does not let go of."""
        if self._process.poll() is None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(KILL_S)
        until = time.monotonic() + KILL_S
        # The stubs: the kernel reuses the dead server's pid for no session while one of them lives.
        while (pids := shm.processes(self.pid)) and time.monotonic() < until:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S)


def ready(host: str, http_port: int) -> bool:
    """Whether a Triton server says that it and all its models are ready."""
    return answers(host, http_port) or False


def answers(host: str, http_port: int) -> bool | None:
    """What a Triton server says to the question whether it is `ready`; None if it says nothing."""
    try:
        with urlopen(f"http://{host}:{http_port}/v2/health/ready", timeout=10) as response:
            return response.status == 200
    except urllib.error.HTTPError:
        return False
    except (OSError, HTTPException):  # also where something else has the port
        return None


def why(path: Path, most: int = 8, last: int = 6) -> str:
    """What a server's log says of its end: its first ``most`` error lines, then its ``last`` lines, cut to a readable width."""
    lines = path.read_text(errors="replace").splitlines()
    errors = [line for line in lines if ERROR.match(line) and not any(text in line for text in HARMLESS)][:most]
    return "\n".join(line[:400] for line in [*errors, *(line for line in lines[-last:] if line not in errors)])


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise KeyboardInterrupt as Ctrl-C does, so that a ``with Server`` is left in order."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_free(host: str, port: int) -> None:
    """Raise ServerError if nothing can listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(f"port {port} on {host} cannot be used ({error.strerror.lower()}): is a server running already?") from error


def dying_with_us(command: list[str]) -> list[str]:
    """A command line that does the same, but gets SIGTERM when this thread ends, so that a killed `sun serve` does not leave it for ever.

    A program sets that, and not the child of a fork before it becomes one (preexec_fn): where this process has used gRPC, whose threads come
    back in such a child, one child in sixty was aborted there. Without, Python starts processes by vfork.
    """
    return [sys.executable, "-I", "-S", "-c", DYING, str(os.getpid()), *command]


def _sweep_tickets(server: str) -> None:
    """Delete the KV that a server's processes have left, leased or not, and the folder if no process has any there."""
    from sun.handoff.shm import Shm, default_root

    if default_root().is_dir():
        left = Shm()
        left.sweep(server)
        left.close()
