"""A refusal for want of room says when there will be some."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun.router.errors import Busy
from sun.router.fair_queue import Bounds, FairQueue
from sun.router.limits import Limits
from sun.router.pace import Pace

from . import tiny
from .harness import OPEN_ENDED, TEXT
from .test_keys import Clock


def test_the_pace_is_that_of_recent_tokens_and_idle_times_do_not_count():
    clock = Clock()
    pace = Pace(clock)
    assert pace.seconds(1000) == 0, "nothing is known yet"
    for _ in range(300):
        clock.now += 0.1
        pace.note(5)
    assert pace.seconds(500) == pytest.approx(10, rel=0.05)
    clock.now += 8 * 3600
    for _ in range(3):
        pace.note(5)
        clock.now += 0.1
    assert pace.seconds(500) == pytest.approx(10, rel=0.15)
    for _ in range(1200):
        clock.now += 0.1
        pace.note(20)
    assert pace.seconds(500) == pytest.approx(2.5, rel=0.1)


@given(st.floats(allow_nan=False, allow_infinity=True))
def test_what_a_client_is_told_lies_within_a_minute(seconds):
    told = re.search(r"; retry after (\d+) s$", str(Busy("max_inflight: full", seconds)))
    assert 1 <= int(told[1]) <= 60


def test_a_full_queue_tells_how_long_the_excess_takes():
    queue = FairQueue(Bounds(tokens=100), wait_s=lambda tokens: tokens / 10)
    queue.put("a", 90, "first")
    with pytest.raises(Busy, match=r"^max_queued_tokens: .*; retry after 4 s$"):
        queue.put("a", 50, "second")


def test_a_full_router_tells_it_too(serve):
    service = serve(limits=Limits(max_inflight=1, max_tokens=tiny.CONTEXT))
    assert service.ask(TEXT, max_tokens=50, ignore_eos=True).whole
    gate = service.gate()
    running = service.ask(TEXT, **OPEN_ENDED)
    gate.wait_entered(1)
    error = service.ask(TEXT).error
    assert isinstance(error, Busy) and re.fullmatch(r"max_inflight: 1 requests are in flight, which is the limit; retry after \d+ s", str(error))
    gate.open()
    assert running.whole
