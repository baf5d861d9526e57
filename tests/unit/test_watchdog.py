"""A process that hangs ends itself and says where it stood; one that works or rests lives on."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sun.watchdog import Watchdog

from .harness import PATIENCE_S

SOON, LATE = 0.3, 2.0
"""Seconds after which processes that hang end, and after which those that live on would if they hung: long enough for a busy machine."""
BEGIN = "import ctypes, itertools, threading, time\nfrom sun.watchdog import Watchdog\n"
HANGS = {
    "in its work": "Watchdog(lambda: 7, {hang})\ndef stuck():\n    threading.Event().wait()\nstuck()",
    "with Python's lock": "Watchdog(lambda: None, {hang})\ndef stuck():\n    ctypes.PyDLL(None).pause()\nstuck()",
    "in its engine's lock": "lock = threading.Lock()\nlock.acquire()\nWatchdog(lock.acquire, {hang})\ndef stuck():\n    threading.Event().wait()\nstuck()",
}
LIVES = {
    "works": "watchdog = Watchdog(itertools.count().__next__, {hang})\ntime.sleep(1.5 * {hang})",
    "rests": "watchdog = Watchdog(lambda: None, {hang})\ntime.sleep(1.5 * {hang})",
    "is closed": "watchdog = Watchdog(lambda: 7, {hang})\nwatchdog.close()\ntime.sleep(1.5 * {hang})",
}


def start(code: str, hang: float) -> subprocess.Popen:
    """A process that runs this."""
    return subprocess.Popen([sys.executable, "-c", BEGIN + code.format(hang=hang)], stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen) -> tuple[int, str]:
    """Its exit code and what it said; it must end."""
    with process:
        said = process.communicate(timeout=PATIENCE_S)[1]
    return process.returncode, said


@pytest.mark.parametrize("code", HANGS.values(), ids=HANGS)
def test_a_process_that_hangs_exits_with_all_stacks(code):
    exit_code, said = end(start(code, SOON))
    assert exit_code == 1 and "Timeout" in said and "in stuck" in said


def test_one_that_works_or_rests_or_is_closed_lives_on():
    started = {name: start(code, LATE) for name, code in LIVES.items()}
    assert {name: end(process) for name, process in started.items()} == dict.fromkeys(LIVES, (0, ""))


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_must_be_over_zero(limit):
    with pytest.raises(ValueError, match="hang_s: got"):
        Watchdog(lambda: None, limit)
