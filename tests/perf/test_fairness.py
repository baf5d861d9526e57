"""The measurement of fairness: what it counts of a flood, and the factors that it makes."""

from __future__ import annotations

import threading
import time

import pytest

from sun_client.errors import SunError
from sun_perf import fairness


class Client:
    """A server's client: some requests are answered, some refused, and the rest wait until it is closed."""

    fate = {"answer": None, "refuse": SunError("full; retry after 1 s"), "fail": SunError("broken", "INTERNAL")}

    def __init__(self, url: str):
        self.closed = threading.Event()

    def generate(self, task: str, text: str, sampling: dict):
        if task == "wait":
            assert self.closed.wait(30)
            raise SunError("closed", "CANCELLED")
        if error := self.fate[task]:
            raise error

    def close(self) -> None:
        self.closed.set()


@pytest.mark.parametrize(("task", "name"), [("answer", "answered"), ("refuse", "refused"), ("fail", "failed")])
def test_a_flood_counts_what_became_of_its_requests(monkeypatch, task, name):
    monkeypatch.setattr(fairness, "SunClient", Client)
    with fairness.flood("host:1", task, 2000.0, seed=0) as counts:
        end = time.monotonic() + 30
        while counts[name] < 10 and time.monotonic() < end:
            time.sleep(0.01)
    assert counts[name] >= 10 and counts["sent"] >= counts[name] and counts.keys() <= {"sent", name, "cut off"}


def test_a_floods_end_ends_what_waits(monkeypatch):
    monkeypatch.setattr(fairness, "SunClient", Client)
    with fairness.flood("host:1", "wait", 2000.0, seed=0) as counts:
        end = time.monotonic() + 30
        while counts["sent"] < 2 * fairness.AT_ONCE and time.monotonic() < end:
            time.sleep(0.01)
    assert counts["cut off"] == fairness.AT_ONCE, "the rest were never sent to the server"


def test_factors_are_of_each_rounds_own_quiet_phase(monkeypatch):
    asked = []

    def phase(server, kept, flooding, rate, times, seconds, seed):
        asked.append((flooding, seconds))
        slow = 1 + len(asked) // 6  # the machine is slower in the last round
        return {"ttft_ms": [100.0 * slow * {None: 1, "b": 2, "a": 9}[flooding]] * 3, "flood": {}}

    monkeypatch.setattr(fairness, "phase", phase)
    report = fairness.measure("host:1", "a", "b", 1.0, 20.0, 30.0, rounds=2)
    assert [flooding for flooding, _ in asked] == [None, "b", "a"] * 3 and [seconds for _, seconds in asked[3:]] == [30.0] * 6
    assert len(report["rounds"]) == 2
    assert 1.9 < report["p95_over_quiet"]["flood"]["median"] < 3.1 and 8.9 < report["p95_over_quiet"]["one line"]["median"] < 13.6
