"""Who may begin: so many at once, of one task three quarters of them, and no more tokens than there is room for."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from sun.router.admission import Admission
from sun.router.errors import Busy
from sun.router.fair_queue import Bounds

names = itertools.count()


def request(task: str = "a", prompt: int = 4, answer: int = 6, ended: bool = False) -> SimpleNamespace:
    """What an `Active` says of itself: a prompt and an answer of at most so many tokens."""
    return SimpleNamespace(key=str(next(names)), admit=SimpleNamespace(task=task, prompt=[0] * prompt), cost=prompt + answer, priority="normal",
                           ended=ended, tokens=[])


def admission(starting: int = 4, room: int | None = None, bounds: Bounds = Bounds()) -> Admission:
    return Admission(bounds, starting, lambda: room)


def taken(it: Admission) -> list[SimpleNamespace]:
    """All that may begin now."""
    return list(iter(it.take, None))


def test_so_many_begin_at_once_and_one_task_leaves_others_a_place():
    it = admission(starting=4)
    flood = [request("a") for _ in range(6)]
    for one in flood:
        it.put(one)
    assert taken(it) == flood[:3]
    other = request("b")
    it.put(other)
    assert taken(it) == [other]
    it.put(request("b"))
    assert it.take() is None, "all four places are taken"
    it.begun(flood[0])
    assert len(taken(it)) == 1


def test_what_runs_stays_within_the_room_and_an_end_makes_some():
    it = admission(room=25)
    first, second, third = (request() for _ in range(3))
    for one in (first, second, third):
        it.put(one)
    assert taken(it) == [first, second] and it.running_tokens == 20 and it.tokens == 30
    for one in (first, second):
        it.begun(one)
    assert it.take() is None, "they have begun, and still run"
    it.ended(first)
    it.ended(first)
    assert taken(it) == [third] and it.running_tokens == 20


def test_one_that_is_larger_than_the_room_runs_alone():
    it = admission(room=5)
    large, next_one = request(), request()
    it.put(large)
    it.put(next_one)
    assert taken(it) == [large]
    it.ended(large)
    assert taken(it) == [next_one]


def test_one_that_ends_in_the_queue_leaves_it_also_if_it_ended_before_it_came():
    it = admission()
    gone, late = request(), request(ended=True)
    it.put(gone)
    it.ended(gone)
    it.put(late)
    assert it.take() is None and it.tokens == 0


def test_tokens_that_were_not_used_count_for_nobody():
    it, order = admission(starting=1), []
    for task in ("short", "long") * 3:
        it.put(request(task, answer=96))
    for _ in range(5):
        order.append(it.take())
        order[-1].tokens = [0] * (2 if order[-1].admit.task == "short" else 96)
        it.begun(order[-1])
        it.ended(order[-1])
    assert [one.admit.task for one in order] == ["long", "short", "short", "short", "long"]


def test_a_refusal_names_the_bound_and_takes_nothing():
    it = admission(bounds=Bounds(tokens=15))
    it.put(request())
    with pytest.raises(Busy, match="max_queued_tokens"):
        it.put(request())
    assert it.tokens == 10
