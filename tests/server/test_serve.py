"""`sun serve` ends as an operator expects: streams end whole, new work is refused, and a second signal ends it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.grpc as grpcclient

from sun.handoff.shm import published
from sun_build.tasks import add_task
from sun_client import shm
from sun_client.client import SunClient
from sun_client.control import Control
from sun_client.errors import SunError
from sun_client.server import Ports
from tests.server.conftest import free_ports, make_root, wait_until

TOKENS = 150
ENDED_S = 60.0


class Serving:
    """A `sun serve` of its own process, and the tritonserver that it started."""

    def __init__(self, root: Path, ports: Ports, process: subprocess.Popen):
        self.url, self.process = f"127.0.0.1:{ports.grpc}", process
        (control,) = Control.running(root)
        self.server = control.pid

    def terminate(self) -> None:
        """SIGTERM, and wait until new work is refused."""
        self.process.send_signal(signal.SIGTERM)
        assert wait_until(self._refuses)

    def _refuses(self) -> bool:
        with SunClient(self.url) as client:
            try:
                client.generate("mine", "hello", sampling={"max_tokens": 1}, timeout=5)
            except SunError:
                return True
        return False


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    """One task and one decode worker, served by the command."""
    root, ports = make_root(tmp_path / "root", models=("sun", "tokenize", "decode_0")), free_ports()
    add_task(root / "model_repository", root / "build" / "base", "mine")
    flags = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", str(getattr(ports, name)))]
    command = [sys.executable, "-m", "sun_client.cli", "serve", "--root", str(root), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = []
        while not (said and said[-1] == "Ctrl-C stops it.\n"):
            said.append(process.stdout.readline())
            assert said[-1], "".join(said)
        yield Serving(root, ports, process)
    finally:
        process.kill()  # its server gets SIGTERM then
        process.wait()


def test_a_first_sigterm_refuses_new_work_and_lets_streams_end(serving):
    with SunClient(serving.url) as client:
        pieces = client.stream("mine", "hello", sampling={"max_tokens": TOKENS, "ignore_eos": True})
        first = next(pieces)
        serving.terminate()
        rest = list(pieces)
    assert sum(len(piece.token_ids) for piece in [first, *rest]) == TOKENS and rest[-1].finish_reason == "length"
    assert serving.process.wait(ENDED_S) == 0 and "Stopped." in serving.process.stdout.read()
    assert shm.processes(serving.server) == [] and published() == []


def test_a_second_sigterm_ends_it_at_once_whatever_clients_hold(serving):
    with grpcclient.InferenceServerClient(serving.url) as idle, SunClient(serving.url) as client:
        idle.start_stream(callback=lambda result, error: None)
        pieces = client.stream("mine", "hello", sampling={"max_tokens": 3000, "ignore_eos": True})
        next(pieces)
        serving.terminate()
        serving.process.send_signal(signal.SIGTERM)
        assert serving.process.wait(ENDED_S / 3) == 0
        with pytest.raises(SunError):
            list(pieces)
    assert shm.processes(serving.server) == [] and published() == []
    with pytest.raises(ProcessLookupError):
        os.kill(serving.server, 0)
