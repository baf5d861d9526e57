"""A server's models and their processes are told apart, living from dead, and others' processes are not counted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sun.stubs import Stubs

WAIT = "import time\ntime.sleep(600)\n"


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    """A function: starts a process that looks like a model's stub, a child of this one."""
    started = []

    def start(model: str, name: str = "model.py", instance: str = "_0_0") -> subprocess.Popen:
        file = tmp_path / "a repository" / model / "1" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(WAIT)
        started.append(subprocess.Popen([sys.executable, str(file), "region", "1", "1", "1", "backends", "1", model + instance]))
        while not Path(f"/proc/{started[-1].pid}/cmdline").read_bytes().endswith(f"{model}{instance}\0".encode()):
            time.sleep(0.01)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_each_model_has_its_processes(start):
    one, two, other = start("decode_0"), start("decode_0"), start("prefill_bash")
    start("decode_1", "other.py")
    start("decode_1", instance="")  # completes a configuration
    assert Stubs(os.getpid()).models() == {"decode_0": {one.pid, two.pid}, "prefill_bash": {other.pid}}
    assert Stubs(os.getpid()).pids("decode_0") == {one.pid, two.pid} and Stubs(os.getpid()).pids("decode_1") == frozenset()


def test_a_killed_process_is_dead_though_nobody_has_waited_for_it(start):
    stubs, process = Stubs(os.getpid()), start("decode_0")
    pids = stubs.pids("decode_0")
    assert stubs.alive(pids) and stubs.killed(pids) == frozenset()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not stubs.alive(pids) and stubs.pids("decode_0") == frozenset() and stubs.killed(pids) == pids
    process.wait()
    assert stubs.killed(pids) == frozenset(), "whoever waits for it knows"


def test_a_stopped_process_is_told_from_others_and_killed_only_as_its_models(start):
    stubs, one, other = Stubs(os.getpid()), start("decode_0"), start("decode_1")
    both = frozenset((one.pid, other.pid))
    one.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, one.pid, os.WSTOPPED)
    assert stubs.stopped(both) == {one.pid} and stubs.alive(both)
    Stubs(os.getppid()).kill("decode_0", both)
    assert stubs.alive(both), "another server's"
    stubs.kill("decode_0", both)
    assert one.wait() == -signal.SIGKILL and stubs.alive(frozenset((other.pid,))), "another model's"
    stubs.kill("decode_0", both)


def test_a_new_process_of_the_model_is_found_and_the_old_ones_callers_still_know_it_is_dead(start):
    stubs, first = Stubs(os.getpid()), start("decode_0")
    pids = stubs.pids("decode_0")
    first.kill()
    first.wait()
    second = start("decode_0")
    assert stubs.pids("decode_0") == {second.pid} and not stubs.alive(pids)


def test_another_servers_models_are_not_its_own(start):
    start("decode_0")
    assert Stubs(os.getppid()).pids("decode_0") == frozenset()
