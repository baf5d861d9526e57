"""The measurement of pauses: the longest time between two tokens of a stream, while something changes and while nothing does."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from sun_perf import changes
from sun_perf.changes import Streams, actions, measure


class Client:
    """Answers of ``tokens`` tokens a hundredth of a second apart, but for as long as ``still`` is set."""

    still, tokens = threading.Event(), 150

    def __init__(self, url: str):
        pass

    def stream(self, task: str, text: str, sampling: dict):
        for _ in range(self.tokens):
            while self.still.is_set():
                time.sleep(0.01)
            time.sleep(0.01)
            yield text
        if task == "broken":
            raise ValueError("no such task")

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def client(monkeypatch):
    monkeypatch.setattr(changes, "SunClient", Client)
    Client.still.clear()
    yield Client
    Client.still.clear()


def test_a_pause_is_found_in_the_time_that_it_lies_in_and_in_no_other(client):
    with Streams("host:1", ["a", "b"], 2) as streams:
        start = time.perf_counter()
        time.sleep(0.2)
        client.still.set()
        begun = time.perf_counter()
        time.sleep(1.0)
        client.still.clear()
        ended = time.perf_counter()
        time.sleep(0.3)
        end = time.perf_counter()
    # A token that is under way when the pause begins comes late on a busy machine, and the pause is the shorter for it.
    assert streams.longest_ms(begun, ended) >= 800 and streams.longest_ms(start, end) >= 800
    assert streams.longest_ms(end + 100, end + 101) == 0
    assert streams.longest_ms(ended + 0.2, end) < 800, "an earlier pause is none of this time's"
    assert streams.failed == []


def test_each_change_is_followed_by_as_long_a_time_without(client, monkeypatch):
    monkeypatch.setattr(client, "tokens", 300)  # one answer for all of it: the time to an answer's first token is no pause
    monkeypatch.setattr(changes.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.3)))

    def still() -> None:
        client.still.set()
        time.sleep(0.3)
        client.still.clear()

    report = measure("host:1", ["a"], 1, {"stop": still, "nothing": lambda: time.sleep(0.3)}, rounds=2)
    assert [len(values) for values in report["changes"]["stop"].values()] == [2, 2, 2]
    assert min(report["changes"]["stop"]["longest_ms"]) >= 200 and report["failed"] == []


def test_a_stream_that_fails_is_reported():
    with Streams("host:1", ["broken"], 1) as streams:
        end = time.monotonic() + 30
        while not streams.failed and time.monotonic() < end:
            time.sleep(0.01)
    assert streams.failed[0] == "broken: no such task"


def test_a_change_that_fails_says_which_and_why(tmp_path: Path):
    with pytest.raises(RuntimeError, match="sun task remove guest: sun: no model_repository"):
        actions(tmp_path, [tmp_path, tmp_path])["remove it"]()
