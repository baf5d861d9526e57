"""Our own load generator ends at once when a request fails."""

from __future__ import annotations

import threading

import pytest

from sun_client.errors import SunError
from sun_perf import load
from sun_perf.workload import Request


class Stuck:
    """A client whose first request fails while all others wait until it is closed."""

    def __init__(self, url: str):
        self.closed = threading.Event()

    def stream(self, task: str, text: str, sampling: dict):
        if text != "fails":
            self.closed.wait()
        raise SunError("no such task")
        yield

    def close(self) -> None:
        self.closed.set()


@pytest.mark.parametrize("send", [
    lambda requests: load.OwnLoad().closed("host:1", requests, 4), lambda requests: load.OwnLoad().open("host:1", requests, [0.0] * len(requests))])
def test_a_failed_request_ends_the_others(monkeypatch, send):
    monkeypatch.setattr(load, "SunClient", Stuck)
    with pytest.raises(SunError, match="no such task"):
        send([Request("a", "fails", 1), *[Request("a", "waits", 1)] * 8])
