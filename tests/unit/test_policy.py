"""Each policy picks as its name says."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun.messages import Load
from sun.router.policy import POLICIES, LeastTokens, Pack, Partitioned, RoundRobin, make_policy, parse_owners

WORKERS = ("decode_0", "decode_1", "decode_2", "decode_3")
load = st.builds(Load, st.integers(0, 5), st.integers(0, 5), st.integers(-5, 5))
loads = st.dictionaries(st.sampled_from(WORKERS), load, min_size=1)
IDLE = Load(0, 0)
tasks = st.sampled_from(["a", "b", "c"])


needs = st.integers(0, 5)


@given(st.lists(st.tuples(tasks, loads, needs), max_size=20))
def test_least_tokens_picks_the_least_load_among_those_with_room(calls):
    policy = LeastTokens()
    for task, load, need in calls:
        roomy = [one for one in load.values() if one.room >= need] or load.values()
        assert load[policy.pick(task, load, need)].tokens == min(one.tokens for one in roomy)


def test_least_tokens_fills_an_idle_pool_evenly():
    policy = LeastTokens()
    assert set(Counter(policy.pick("a", dict.fromkeys(WORKERS, IDLE)) for _ in range(40)).values()) == {10}


@given(st.integers(1, 6), loads, needs)
def test_pack_uses_no_further_worker_than_it_must(full, loads, need):
    picked = Pack(full).pick("a", loads, need)
    roomy = [name for name in sorted(loads) if loads[name].sequences < full and loads[name].room >= need]
    if roomy:
        assert picked == roomy[0]
    else:
        assert loads[picked].tokens == loads[LeastTokens().pick("a", loads, need)].tokens, "as if there were no packing"


def test_pack_fills_one_worker_after_the_other():
    policy, counts = make_policy("pack", pack_batch=3), Counter()
    for _ in range(9):
        counts[policy.pick("a", {name: Load(0, counts[name]) for name in WORKERS[:3]})] += 1
        assert list(counts.values()) == sorted(counts.values(), reverse=True)
    assert counts == dict.fromkeys(WORKERS[:3], 3)


def test_a_batch_to_pack_is_for_that_policy_and_at_least_one():
    with pytest.raises(ValueError, match="pack_batch: needs policy pack, but policy is 'least_tokens'"):
        make_policy("least_tokens", pack_batch=4)
    with pytest.raises(ValueError, match="pack_batch: got -1, must be at least 1"):
        make_policy("pack", pack_batch=-1)


def test_round_robin_cycles_whatever_the_load():
    policy, load = RoundRobin(), {name: Load(1000 * i, i) for i, name in enumerate(WORKERS)}
    assert [policy.pick("a" if i % 3 else "b", load) for i in range(8)] == [*WORKERS, *WORKERS]


@given(st.lists(st.tuples(tasks, st.lists(load, min_size=4, max_size=4)), max_size=30))
def test_partitioned_never_mixes_tasks_while_there_are_workers_for_all(calls):
    policy, owner = Partitioned(), {}
    for task, numbers in calls:
        worker = policy.pick(task, dict(zip(WORKERS, numbers, strict=True)))
        assert owner.setdefault(worker, task) == task


def test_partitioned_keeps_to_the_given_owners_and_to_the_least_load_among_them():
    policy = Partitioned({"a": ["decode_0", "decode_2"], "b": ["decode_1"]})
    load = {"decode_0": Load(5, 1), "decode_1": Load(9, 1), "decode_2": Load(4, 2), "decode_3": IDLE}
    assert policy.pick("a", load) == "decode_2" and policy.pick("b", load) == "decode_1"
    assert policy.pick("c", load) == "decode_3", "a new task goes to a worker that nobody owns"


def test_partitioned_shares_workers_evenly_when_tasks_are_more():
    policy = Partitioned()
    workers = Counter(policy.pick(f"task{i}", dict.fromkeys(WORKERS, IDLE)) for i in range(8))
    assert set(workers.values()) == {2}


def test_partitioned_gives_a_task_no_other_worker_when_its_own_are_not_there():
    assert Partitioned({"a": ["decode_9"]}).pick("a", {"decode_0": IDLE}) is None


@pytest.mark.parametrize("policy", POLICIES.values())
def test_without_workers_there_is_none_to_pick(policy):
    assert policy().pick("a", {}) is None


def test_a_task_without_owners_is_refused_when_every_worker_belongs_to_another():
    with pytest.raises(ValueError, match="owners: task 'b' is not in it"):
        Partitioned({"a": ["decode_0"]}).pick("b", {"decode_0": IDLE})


def test_partitioned_leaves_its_callers_owners_alone():
    owners = {"a": ["decode_0"]}
    Partitioned(owners).pick("b", dict.fromkeys(WORKERS, IDLE))
    assert owners == {"a": ["decode_0"]}


def test_policies_are_made_by_name_and_unknown_names_are_refused_with_the_known():
    assert {name: type(make_policy(name)) for name in POLICIES} == {
        "least_tokens": LeastTokens, "pack": Pack, "round_robin": RoundRobin, "partitioned": Partitioned}
    with pytest.raises(ValueError, match="'fastest'.*least_tokens, pack, round_robin, partitioned"):
        make_policy("fastest")


def test_two_policies_share_no_turns():
    load = dict.fromkeys(WORKERS, IDLE)
    assert make_policy("round_robin").pick("a", load) == make_policy("round_robin").pick("a", load)


@given(st.permutations(WORKERS), st.integers(1, 3))
def test_owners_are_read_as_written(workers, cut):
    owners = {"a": workers[:cut], "b": workers[cut:]}
    text = "  ".join(f"{task}={','.join(names)}" for task, names in owners.items())
    assert parse_owners(text, WORKERS) == owners


@pytest.mark.parametrize(("text", "says"), [
    ("a", "got 'a', expected task=worker"), ("=decode_0", "expected task=worker"), ("a=", "expected task=worker"), ("a=decode_0,", "expected task=worker"),
    ("a=decode_9", "'decode_9' of task 'a' is not a worker; the workers are decode_0, decode_1"),
    ("a=decode_0 a=decode_1", "task 'a' is named twice"), ("a=decode_0 b=decode_0", "worker 'decode_0' is named twice"),
    ("a=decode_0,decode_0", "worker 'decode_0' is named twice"),
])
def test_owners_that_make_no_sense_are_refused_by_parameter(text, says):
    with pytest.raises(ValueError, match="^owners: .*" + says):
        make_policy("partitioned", text, WORKERS)


def test_owners_are_for_the_partitioned_policy_alone():
    with pytest.raises(ValueError, match="owners: needs policy partitioned, but policy is 'round_robin'"):
        make_policy("round_robin", "a=decode_0", WORKERS)
    assert make_policy("partitioned", "a=decode_3", WORKERS).pick("a", dict.fromkeys(WORKERS, IDLE)) == "decode_3"
