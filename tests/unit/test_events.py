"""A worker's events reach their router over its socket, in order; an end is told from a death, and strangers hear nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sun.decode.outbox import Outbox
from sun.events import EventServer, hear
from sun.messages import Load, StepEvents, TokenEvent

from .harness import within

WORKER = """
import sys
from sun.decode.outbox import Outbox
from sun.events import EventServer
server = EventServer(Outbox())
print("ready", flush=True)
sys.stdin.read()
"""
BROKEN = (EOFError, OSError)


def step(number: int) -> StepEvents:
    return StepEvents(step=number, load=Load(3, 2), events=[TokenEvent(id="r-1", token=number, top=[(number, -0.5)]), TokenEvent(id="r-2", error="ü")])


@pytest.fixture
def outbox() -> Outbox:
    """What the server sends from, with one sequence of router "r"."""
    outbox = Outbox()
    outbox.opened("r")
    return outbox


@pytest.fixture
def server(outbox: Outbox) -> Iterator[EventServer]:
    """This process as a worker."""
    server = EventServer(outbox)
    yield server
    server.close()


def test_a_router_hears_every_step_until_it_has_no_sequence_left(outbox, server):
    outbox.opened("another's")
    for number in range(500):
        outbox.put("r", step(number))
    heard = hear(os.getpid(), "r")
    assert within(lambda: [next(heard) for _ in range(500)]) == [step(number) for number in range(500)]
    outbox.put("r", step(500))
    outbox.closed("r")
    assert within(lambda: list(heard)) == [step(500)]


def test_a_worker_that_closes_breaks_off_and_is_told_from_one_that_has_no_more(outbox, server):
    outbox.put("r", step(1))
    heard = hear(os.getpid(), "r")
    assert next(heard) == step(1)
    server.close()
    outbox.put("r", step(2))
    outbox.closed("r")
    with pytest.raises(BROKEN):
        within(lambda: next(heard))
    with pytest.raises(BROKEN):
        next(hear(os.getpid(), "r"))


def test_processes_of_another_server_hear_nothing():
    with subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout.readline() == b"ready\n"
        with pytest.raises(BROKEN):
            within(lambda: next(hear(worker.pid, "r")))
        worker.communicate()
    with pytest.raises(BROKEN):
        next(hear(worker.pid, "r"))
