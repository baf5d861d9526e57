"""Beginnings that prompts share are found, as far as they are kept, and never another's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sun.prefill.prefix_cache import BLOCK, PrefixCache

IDS = st.lists(st.sampled_from([1, 2]), max_size=5 * BLOCK)


def kv(ids: list[int]) -> torch.Tensor:
    """K and V [1, 2, 1, len(ids), 1] that tell which tokens they are of: each is a hash of all tokens up to its own."""
    return torch.tensor([float(hash(tuple(ids[: i + 1])) % 2**20) for i in range(len(ids))]).reshape(1, 1, 1, -1, 1).expand(1, 2, 1, -1, 1)


def matched(cache: PrefixCache, ids: list[int]) -> int:
    """How many tokens' K and V are found, which must be the right ones."""
    blocks = cache.match(ids)
    if blocks:
        assert torch.equal(torch.cat(blocks, dim=-2), kv(ids)[..., : len(blocks) * BLOCK, :])
    return len(blocks) * BLOCK


@given(st.lists(IDS, max_size=12))
def test_with_room_for_all_the_longest_common_beginning_is_found(prompts):
    cache = PrefixCache(10_000)
    for i, ids in enumerate(prompts):
        common = [next((n for n, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other))) for other in prompts[:i]]
        assert matched(cache, ids) == max([n // BLOCK * BLOCK for n in common], default=0)
        cache.add(ids, kv(ids))


@given(st.lists(IDS, max_size=20), st.integers(0, 4 * BLOCK))
def test_with_little_room_what_is_found_is_right_and_the_room_is_kept(prompts, tokens):
    cache = PrefixCache(tokens)
    for ids in prompts:
        matched(cache, ids)
        cache.add(ids, kv(ids))
        assert len(cache._blocks) <= tokens // BLOCK
        assert matched(cache, ids) == min(len(ids) // BLOCK, tokens // BLOCK) * BLOCK


def test_a_beginning_that_all_use_outlives_what_follows_it():
    cache, system = PrefixCache(4 * BLOCK), list(range(2 * BLOCK))
    for i in range(20):
        ids = [*system, *[100 + i] * 3 * BLOCK]
        assert matched(cache, ids) == (2 * BLOCK if i else 0)
        cache.add(ids, kv(ids))


@pytest.mark.parametrize("tokens", [0, BLOCK - 1])
def test_without_room_nothing_is_kept(tokens):
    cache, ids = PrefixCache(tokens), list(range(3 * BLOCK))
    cache.add(ids, kv(ids))
    assert matched(cache, ids) == 0


def test_what_is_kept_is_a_copy_and_the_rest_of_a_block_is_not():
    cache, ids = PrefixCache(100), list(range(2 * BLOCK + 3))
    original = kv(ids).contiguous()
    cache.add(ids, original)
    original.zero_()
    assert matched(cache, ids) == 2 * BLOCK
    assert (cache.asked, cache.found) == (len(ids), 2 * BLOCK)
