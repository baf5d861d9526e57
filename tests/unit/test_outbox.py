"""Events reach their router once and in order, whoever listens, and listening ends with the last sequence."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun.decode import outbox as outbox_module
from sun.decode.outbox import Outbox
from sun.messages import Load, StepEvents

from .harness import PATIENCE_S, eventually, within


def step(number: int) -> StepEvents:
    return StepEvents(step=number, load=Load(0, 0), events=[])


def numbers(batches) -> list[int]:
    return [each.step for batch in batches for each in batch]


class Listener:
    """Listens in a thread; each list that comes is in ``heard``, and None at the end."""

    def __init__(self, outbox: Outbox, router: str = "r"):
        self.heard: queue.Queue[list[int] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, args=(outbox, router), daemon=True)
        self._thread.start()

    def _run(self, outbox: Outbox, router: str) -> None:
        for batch in outbox.listen(router):
            self.heard.put([each.step for each in batch])
        self.heard.put(None)

    def next(self) -> list[int] | None:
        return self.heard.get(timeout=PATIENCE_S)

    def rest(self) -> list[int]:
        """All steps until the end."""
        steps = []
        while (batch := self.next()) is not None:
            steps += batch
        return steps


@pytest.fixture
def clock(monkeypatch):
    """The outbox's time, which stands until it is moved."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(outbox_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_what_was_put_before_anybody_listened_is_heard():
    outbox = Outbox()
    outbox.opened("r")
    for i in range(3):
        outbox.put("r", step(i))
    outbox.closed("r")
    assert within(lambda: numbers(outbox.listen("r"))) == [0, 1, 2]


def test_listening_goes_on_while_a_sequence_lives_and_ends_with_the_last():
    outbox = Outbox()
    outbox.opened("r")
    outbox.opened("r")
    listener = Listener(outbox)
    outbox.put("r", step(1))
    assert listener.next() == [1]
    outbox.closed("r")
    outbox.put("r", step(2))
    assert listener.next() == [2]
    outbox.put("r", step(3))
    outbox.closed("r")
    assert listener.rest() == [3]


def test_a_waiting_listener_ends_when_the_last_sequence_goes_without_a_word():
    outbox = Outbox()
    outbox.opened("r")
    listener = Listener(outbox)
    eventually(lambda: len(outbox._changed._waiters) == 1)
    outbox.closed("r")
    assert listener.next() is None


def test_a_router_without_sequences_hears_nothing_and_ends():
    assert within(lambda: list(Outbox().listen("r"))) == []


def test_routers_hear_only_their_own():
    outbox = Outbox()
    for router in ("a", "b"):
        outbox.opened(router)
    for i in range(6):
        outbox.put("ab"[i % 2], step(i))
    for router in ("a", "b"):
        outbox.closed(router)
    assert within(lambda: numbers(outbox.listen("a"))) == [0, 2, 4]
    assert within(lambda: numbers(outbox.listen("b"))) == [1, 3, 5]


def test_a_second_listener_takes_over_and_the_first_ends():
    outbox = Outbox()
    outbox.opened("r")
    first = Listener(outbox)
    outbox.put("r", step(1))
    assert first.next() == [1]
    second = Listener(outbox)
    assert first.next() is None
    outbox.put("r", step(2))
    outbox.closed("r")
    assert second.rest() == [2]


@given(st.lists(st.booleans(), min_size=1, max_size=25))
def test_nothing_is_lost_or_repeated_across_takeovers(moves):
    outbox, listeners, count = Outbox(), [], 0
    outbox.opened("r")
    for takeover in moves:
        if takeover:
            listeners.append(Listener(outbox))
        else:
            outbox.put("r", step(count))
            count += 1
    outbox.put("r", step(count))
    outbox.closed("r")
    heard = [listener.rest() for listener in listeners]
    heard.append(within(lambda: numbers(outbox.listen("r"))))
    assert all(steps == sorted(steps) for steps in heard)
    assert sorted(sum(heard, [])) == list(range(count + 1))


def test_a_listener_that_gave_up_leaves_the_rest_to_the_next():
    outbox = Outbox()
    outbox.opened("r")
    outbox.put("r", step(1))
    first = outbox.listen("r")
    assert numbers([next(first)]) == [1]
    first.close()
    outbox.put("r", step(2))
    outbox.closed("r")
    assert within(lambda: numbers(outbox.listen("r"))) == [2]


def test_a_router_that_never_listens_is_taken_for_dead_and_its_steps_are_dropped(clock):
    outbox = Outbox()
    outbox.opened("r")
    assert outbox.put("r", step(1))
    clock.now += outbox_module.ABANDONED_S
    assert outbox.put("r", step(2)), "not yet"
    clock.now += 1
    assert not outbox.put("r", step(3))
    outbox.closed("r")
    assert within(lambda: numbers(outbox.listen("r"))) == []


def test_a_router_that_listens_is_never_taken_for_dead(clock):
    outbox = Outbox()
    outbox.opened("r")
    listener = Listener(outbox)
    outbox.put("r", step(1))
    assert listener.next() == [1]
    clock.now += 100 * outbox_module.ABANDONED_S
    assert outbox.put("r", step(2))
    outbox.closed("r")
    assert listener.rest() == [2]


def test_a_router_that_stopped_listening_is_taken_for_dead_from_then_on(clock):
    outbox = Outbox()
    outbox.opened("r")
    outbox.put("r", step(1))
    listening = outbox.listen("r")
    next(listening)
    clock.now += 100
    listening.close()
    assert outbox.put("r", step(2))
    clock.now += outbox_module.ABANDONED_S + 1
    assert not outbox.put("r", step(3))


def test_a_router_that_comes_back_is_not_held_to_its_past(clock):
    outbox = Outbox()
    outbox.opened("r")
    outbox.put("r", step(1))
    listening = outbox.listen("r")
    next(listening)
    listening.close()  # its stream broke, and it aborted what it had here
    outbox.closed("r")
    clock.now += outbox_module.ABANDONED_S + 1
    outbox.opened("r")
    assert outbox.put("r", step(2)), "a new sequence was dropped before its router could listen"


def test_a_dead_router_does_not_touch_the_living(clock):
    outbox = Outbox()
    outbox.opened("dead")
    clock.now += outbox_module.ABANDONED_S + 1
    outbox.opened("r")
    assert not outbox.put("dead", step(1)) and outbox.put("r", step(1))


def test_what_nobody_fetches_is_not_kept_for_ever(clock):
    outbox = Outbox()
    for i in range(50):  # as many names, each of which is never heard of again
        outbox.opened(f"r{i}")
        outbox.put(f"r{i}", step(i))
        outbox.closed(f"r{i}")
    clock.now += outbox_module.ABANDONED_S - 1
    outbox.opened("r")
    assert within(lambda: numbers(outbox.listen("r49"))) == [49], "not yet"
    clock.now += 2
    outbox.opened("r")
    assert [list(book) for book in (outbox._steps, outbox._live, outbox._unheard_since)] == [[], ["r"], ["r"]]
