"""The gateway beside a server, as a child process of `sun serve`: it outlives the server's restarts, and is started anew when it ends."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

from sun_client.server import HOST, Server, check_free, dying_with_us
from sun_client.supervisor import HEALTHY_S, backoff

ANY = "0.0.0.0"
LAST_S = 5.0
"""For the gateway to end after its server has."""


class GatewayProcess:
    """`sun gateway` for a server, on the server's address and with its certificate. Start it from the main thread.

    say: called with one line for whoever is on call.
    """

    def __init__(self, server: Server, port: int, say: Callable[[str], None]):
        self.host, self.port, self._say = server.host, port, say
        self.log = server.log.with_name(server.log.name.replace("tritonserver", "gateway"))
        address = f"{HOST if server.host == ANY else server.host}:{server.ports.grpc}"
        self._command = [sys.executable, "-m", "sun_client.cli", "gateway", "--host", server.host, "--port", str(port), "--url", address]
        if server.tls is not None:
            self._command[-1] = f"grpcs://{address}"
            self._command += ["--tls-cert", str(server.tls.certificate), "--tls-key", str(server.tls.key)]
        self.url = f"http{'s' if server.tls else ''}://{server.host}:{port}/v1"
        self._process: subprocess.Popen | None = None
        self._failures, self._started, self._due = 0, 0.0, 0.0

    def check(self) -> None:
        """Raise ServerError if the port is taken."""
        check_free(self.host, self.port)

    def start(self) -> None:
        """Start it, and do not wait until it listens."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C in a terminal reaches only us.
            self._process = subprocess.Popen(
                dying_with_us(self._command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self._started = time.monotonic()

    @property
    def pid(self) -> int | None:
        """Its pid; None before the start."""
        return self._process.pid if self._process else None

    def look(self) -> None:
        """Start it anew if it has ended, the later the sooner it ended again. Call it about twice a second."""
        if self._process is None or self._process.poll() is None:
            return
        now = time.monotonic()
        if not self._due:
            self._failures = 0 if now - self._started > HEALTHY_S else self._failures
            pause = backoff(self._failures)
            self._failures, self._due = self._failures + 1, now + pause
            self._say(f"the gateway ended with code {self._process.returncode}, see {self.log}; starting it anew in {pause:g} s")
        elif now >= self._due:
            self._due = 0.0
            self.start()

    def terminate(self) -> None:
        """Have it refuse new requests; what has begun may end while the server lets it."""
        if self._process is not None:
            self._process.terminate()

    def end(self) -> None:
        """Wait for its end, which comes soon when its server has gone, and kill it if it does not."""
        if self._process is None:
            return
        try:
            self._process.wait(LAST_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._process.kill()
            self._process.wait()
