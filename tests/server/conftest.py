"""One real tritonserver for all of these tests: the shipped tasks and the identity task, with two decode workers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sun.handoff.shm import published
from sun_build.tasks import add_task
from sun_client.cli import app
from sun_client.client import SunClient
from sun_client.gateway.serve import Door
from sun_client.gateway.upstream import Upstream
from sun_client.server import Ports, Server

REPO = Path(__file__).parents[2]
OWN_MODELS = ("sun", "tokenize", "decode_0", "decode_1")
SHIPPED = ("banking", "bash", "math")
CORE, NICE = min(os.sched_getaffinity(0)), 4
"""Where one decode worker and the identity task's prefill module run, and how far the latter lets others go first."""
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the server's log with a failed test."""
    report = yield
    server = item.funcargs.get("server") if hasattr(item, "funcargs") else None
    if report.failed and server is not None:
        report.sections.append(("tritonserver's log", "\n".join(server.log.read_text(errors="replace").splitlines()[-60:])))
    return report


def make_root(root: Path, base: Path = REPO / "build" / "base", models: Sequence[str] = OWN_MODELS) -> Path:
    """A repository root like the project's own, with a base, these backends and the models that are committed."""
    if not (base / "sun_base.json").is_file():
        pytest.fail(f"no base model in {base}: run `make setup` first")
    (root / "build").mkdir(parents=True)
    (root / "build" / "base").symlink_to(base)
    (root / "backends").symlink_to(REPO / "backends")
    for name in models:
        shutil.copytree(REPO / "model_repository" / name, root / "model_repository" / name)
    return root


def free_ports() -> Ports:
    """Three ports that nobody uses now."""
    sockets = [socket.socket() for _ in range(3)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = Ports(*(probe.getsockname()[1] for probe in sockets))
    for probe in sockets:
        probe.close()
    return ports


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether ``holds`` comes true in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def sun(*words: str, code: int = 0) -> str:
    """The output of a `sun` command that ends with this exit code, run in this process: one of its own would import torch again."""
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.stdout


@contextlib.contextmanager
def gateway(url: str, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The address of a gateway to a server, which runs in a thread of its own."""
    loop, told, address = asyncio.new_event_loop(), asyncio.Event(), []

    async def serve() -> None:
        door = Door(Upstream(url), "127.0.0.1", 0, tls)
        address.append(f"http{'s' if tls else ''}://127.0.0.1:{await door.start()}")
        await told.wait()
        await door.stop(0.0)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert wait_until(lambda: bool(address))
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(told.set)
        thread.join()
        loop.close()


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository that the tests' server serves."""
    root = make_root(tmp_path_factory.mktemp("root") / "sun")
    for task in SHIPPED:
        add_task(root / "model_repository", root / "build" / "base", task, REPO / "build" / "tasks" / task)
    add_task(root / "model_repository", root / "build" / "base", "identity")
    for model, key, value in (("decode_1", "cores", CORE), ("prefill_identity", "cores", CORE), ("prefill_identity", "nice", NICE)):
        with (root / "model_repository" / model / "config.pbtxt").open("a") as config:
            config.write(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n')
    return root


@pytest.fixture(scope="session")
def server(root: Path) -> Iterator[Server]:
    """The running server; what it leaves behind after its end fails the session."""
    with Server(root, free_ports()) as server:
        yield server
        server.stop(drain_s=10)  # Triton waits 30 s for what a load that failed has left
    assert server.leftovers() == []


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[SunClient]:
    """A client of the server."""
    with SunClient(f"127.0.0.1:{server.ports.grpc}") as client:
        yield client


@pytest.fixture
def http(server: Server) -> str:
    """Where the server's models are over HTTP."""
    return f"http://127.0.0.1:{server.ports.http}/v2/models"


@pytest.fixture
def idle(client: SunClient) -> Callable[[], bool]:
    """A function: whether no worker holds a sequence or a slot and no ticket lies in shared memory."""
    return lambda: client.idle() and not published()
