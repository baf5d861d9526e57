"""The KV pool's slots never overlap, never leak, and lie in one piece."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sun.decode.kv_pool import KVPool, Slot

from .test_ticket import GEOMETRY

BUDGET = 40
moves = st.lists(st.tuples(st.booleans(), st.integers(1, BUDGET + 3)), max_size=60)


def pool(budget: int = BUDGET) -> KVPool:
    return KVPool(GEOMETRY, budget)


@given(moves)
def test_any_takes_and_returns_keep_slots_apart_and_tokens_counted(moves):
    it, held, owner = pool(), [], [None] * BUDGET
    for take, number in moves:
        if take:
            slot = it.take(number)
            gaps = "".join(" " if o is None else "x" for o in owner).split("x")
            assert (slot is not None) == any(len(gap) >= number for gap in gaps)
            if slot is not None:
                assert slot.size == number and all(o is None for o in owner[slot.start : slot.start + slot.size])
                owner[slot.start : slot.start + slot.size] = [slot] * slot.size
                held.append(slot)
        elif held:
            slot = held.pop(number % len(held))
            it.give_back(slot)
            owner[slot.start : slot.start + slot.size] = [None] * slot.size
        assert it.free_tokens == owner.count(None) == BUDGET - sum(s.size for s in held)
    for slot in held:
        it.give_back(slot)
    assert it.take(BUDGET) == Slot(0, BUDGET)


def test_the_tightest_gap_is_taken():
    it = pool()
    slots = [it.take(n) for n in (10, 1, 5, 1, 8, 1)]
    for slot in slots[::2]:
        it.give_back(slot)
    assert it.take(5) == slots[2] and it.take(6) == Slot(slots[4].start, 6)


def test_more_than_there_is_in_one_piece_is_not_given():
    it = pool()
    slots = [it.take(10) for _ in range(4)]
    it.give_back(slots[0])
    it.give_back(slots[2])
    assert it.free_tokens == 20 and it.take(11) is None
    it.give_back(slots[1])
    assert it.take(30) == Slot(0, 30)


@pytest.mark.parametrize("wrong", [Slot(0, 10), Slot(0, 5), Slot(5, 10), Slot(9, 2), Slot(15, 10), Slot(35, 6), Slot(0, 40)])
def test_returning_what_is_not_wholly_taken_is_refused_and_changes_nothing(wrong):
    it = pool()
    first, second, rest = it.take(10), it.take(10), it.take(20)
    it.give_back(first)
    it.give_back(rest)
    with pytest.raises(ValueError, match="was not taken"):
        it.give_back(wrong)
    assert it.free_tokens == 30
    it.give_back(second)
    assert it.take(BUDGET) == Slot(0, BUDGET)


def test_a_slot_cannot_be_returned_twice():
    it = pool()
    slot = it.take(10)
    it.give_back(slot)
    with pytest.raises(ValueError):
        it.give_back(slot)


def test_a_view_is_the_slots_memory_and_nobody_elses():
    it = pool()
    it.data.zero_()
    first, second = it.take(10), it.take(10)
    it.view(second, 4).fill_(1.0)
    assert it.view(second, 4).shape == (2, 2, 2, 4, 4)
    assert torch.count_nonzero(it.view(first, 10)) == 0
    assert torch.count_nonzero(it.data) == 2 * 2 * 2 * 4 * 4
    assert torch.all(it.data[:, :, :, second.start : second.start + 4] == 1.0)


def test_a_pool_that_does_not_fit_into_memory_is_refused_saying_what_would(monkeypatch):
    monkeypatch.setattr("sun.decode.kv_pool.available", lambda: GEOMETRY.kv_bytes(100, 4))
    assert KVPool(GEOMETRY, 100).free_tokens == 100
    with pytest.raises(MemoryError, match="^kv_tokens: 101 tokens of KV need .* GiB, .* are free; 100 would fit"):
        KVPool(GEOMETRY, 101)


def test_a_pool_that_does_not_fit_into_a_gpus_memory_is_refused_by_the_same_name(monkeypatch):
    # 100 tokens of bf16: what the device has free, and what torch keeps of it without need.
    free = {"mem_get_info": (GEOMETRY.kv_bytes(90, 2), 1 << 40), "memory_reserved": GEOMETRY.kv_bytes(30, 2), "memory_allocated": GEOMETRY.kv_bytes(20, 2)}
    for name, value in free.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device, value=value: value)
    with pytest.raises(MemoryError, match="^kv_tokens: 101 tokens of KV need .* GiB, .* are free; 100 would fit"):
        KVPool(GEOMETRY, 101, "cuda:0", torch.bfloat16)


@pytest.mark.parametrize("budget", [0, -5])
def test_a_pool_of_nothing_is_refused_by_name(budget):
    with pytest.raises(ValueError, match=f"^kv_tokens: must be 1 or more, got {budget}"):
        KVPool(GEOMETRY, budget)


def test_a_pool_takes_kv_of_either_format_widened():
    it, kv = pool(), torch.randn(GEOMETRY.layers, 2, GEOMETRY.kv_heads, 7, GEOMETRY.head_dim)
    for sent in (kv, kv.bfloat16()):
        slot = it.take(7)
        it.fill(slot, sent)
        assert it.view(slot, 7).dtype is torch.float32 and torch.equal(it.view(slot, 7), sent.float())
