"""Tasks share what is served by their weights, whoever floods; nobody starves, saves up, or waits without a bound."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun.router.errors import RequestError
from sun.router.fair_queue import PRIORITIES, Bounds, FairQueue, parse_weights

WIDE = Bounds(tokens=10**9, task_tokens=10**9)


def test_within_a_task_first_come_is_first_served():
    queue = FairQueue(WIDE)
    for i in range(5):
        queue.put("a", 10, i)
    assert [queue.pop()[2] for _ in range(5)] == [0, 1, 2, 3, 4] and queue.pop() is None


def test_a_flood_of_one_task_lets_anothers_request_pass():
    queue = FairQueue(WIDE)
    for i in range(100):
        queue.put("flood", 50, i)
    for _ in range(20):
        queue.pop()
    queue.put("quiet", 50, "q")
    assert "q" in [queue.pop()[2] for _ in range(2)]


@pytest.mark.parametrize(("weights", "shares"), [({}, (1, 1)), ({"a": 3.0}, (3, 1)), ({"b": 2.0}, (1, 2))])
def test_while_all_wait_tokens_are_shared_by_weight(weights, shares):
    queue, rng = FairQueue(Bounds(10**9, 10**9, weights)), random.Random(0)
    for i in range(4000):
        queue.put("ab"[i % 2], rng.randint(1, 200), i)
    served = Counter()
    for _ in range(1500):
        task, cost, _ = queue.pop()
        served[task] += cost
    assert served["a"] / served["b"] == pytest.approx(shares[0] / shares[1], rel=0.02)


def test_a_task_that_paused_has_saved_nothing():
    queue = FairQueue(WIDE)
    for i in range(200):
        queue.put("busy", 10, i)
    for _ in range(100):
        queue.pop()
    for i in range(50):
        queue.put("late", 10, i)
    assert Counter(queue.pop()[0] for _ in range(20)) == {"busy": 10, "late": 10}


def test_nor_has_one_that_comes_when_nobody_waits():
    queue = FairQueue(WIDE)
    for i in range(1000):  # served at once, as below saturation
        queue.put("steady", 10, i)
        queue.pop()
    for i in range(500):
        queue.put("flood", 10, i)
    queue.put("steady", 10, "s")
    assert "s" in [queue.pop()[2] for _ in range(3)]


def test_what_was_not_used_is_given_back():
    queue = FairQueue(WIDE)
    for i in range(20):
        queue.put("short", 100, i)
        queue.put("long", 100, i)
    served = Counter()
    for _ in range(22):
        task, cost, _ = queue.pop()
        served[task] += 1
        if task == "short":
            queue.refund(task, 90)
    assert served["short"] > 8 * served["long"]


def test_a_higher_class_goes_first_and_classes_are_fair_within():
    queue = FairQueue(WIDE)
    for priority in reversed(PRIORITIES):
        for task in "ab":
            queue.put(task, 10, (priority, task), priority)
    assert [queue.pop()[2][0] for _ in range(6)] == [p for p in PRIORITIES for _ in range(2)]


def test_what_does_not_fit_yet_is_not_overtaken():
    queue = FairQueue(WIDE)
    queue.put("a", 100, "large")
    queue.put("a", 1, "small")
    assert queue.pop(room=99) is None
    assert queue.pop(room=100)[2] == "large" and queue.pop(room=1)[2] == "small"


def test_a_barred_task_is_passed_over():
    queue = FairQueue(WIDE)
    queue.put("a", 1, "a")
    queue.put("b", 1, "b")
    assert queue.pop(barred=frozenset("a"))[2] == "b" and queue.pop(barred=frozenset("a")) is None and queue.pop()[2] == "a"


@pytest.mark.parametrize(("bounds", "reason"), [
    (Bounds(tokens=100, task_tokens=1000), "max_queued_tokens: 90 tokens wait, 20 more are over the limit of 100"),
    (Bounds(tokens=1000, task_tokens=100), "max_task_queued_tokens: 90 tokens wait of task 'a', 20 more are over the limit of 100"),
])
def test_over_a_bound_a_request_is_refused_by_its_name(bounds, reason):
    queue = FairQueue(bounds)
    queue.put("a", 90, "first")
    with pytest.raises(RequestError, match=reason) as refused:
        queue.put("a", 20, "second")
    assert refused.value.code == "UNAVAILABLE" and len(queue) == 1
    queue.pop()
    queue.put("a", 5000, "alone")
    assert queue.pop()[2] == "alone"


@given(st.lists(st.one_of(
    st.tuples(st.just("put"), st.sampled_from("abc"), st.integers(1, 50), st.sampled_from(PRIORITIES)),
    st.tuples(st.just("pop"), st.sampled_from([None, 5, 30])), st.tuples(st.just("remove"), st.integers(0, 30))), max_size=60))
def test_every_item_leaves_once_and_the_books_are_right(actions):
    queue, waiting = FairQueue(WIDE), {}
    for i, (action, *arguments) in enumerate(actions):
        if action == "put":
            task, cost, priority = arguments
            queue.put(task, cost, i, priority)
            waiting[i] = (task, cost, priority)
        elif action == "pop":
            popped = queue.pop(*arguments)
            if popped is not None:
                task, cost, item = popped
                assert waiting.pop(item)[:2] == (task, cost)
            elif arguments == [None]:
                assert not waiting
        else:
            assert queue.remove(arguments[0]) == (arguments[0] in waiting)
            waiting.pop(arguments[0], None)
        assert len(queue) == len(waiting) and queue.tokens == sum(cost for _, cost, _ in waiting.values())


@pytest.mark.parametrize("text", ["a", "a=", "=1", "a=0", "a=-1", "a=x", "a=inf", "a=nan", "a=1 a=2"])
def test_weights_that_make_no_sense_are_refused(text):
    with pytest.raises(ValueError, match="^weights: "):
        parse_weights(text)


def test_weights_are_read():
    assert parse_weights(" banking=2  bash=0.5 ") == {"banking": 2.0, "bash": 0.5}


def test_what_did_not_run_is_put_back_first_in_its_line_and_costs_nothing():
    queue = FairQueue(Bounds(tokens=40, task_tokens=40))
    for i in range(4):
        queue.put("a", 10, i)
    taken = [queue.pop()[2] for _ in range(2)]
    queue.put("a", 10, 4), queue.put("a", 10, 5)
    for item in reversed(taken):  # past the bound, which is for what comes
        queue.put_back("a", 10, item)
    assert queue.tokens == 60
    assert [queue.pop()[2] for _ in range(6)] == [0, 1, 2, 3, 4, 5] and queue.pop() is None and queue.tokens == 0
