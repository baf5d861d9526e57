"""K and V of beginnings that prompts share: a system prompt, or a conversation so far."""

from __future__ import annotations

import itertools
from collections import OrderedDict

from torch import Tensor

BLOCK = 8
"""Tokens a block. Small, so that little of a short system prompt is left out."""


class PrefixCache:
    """Blocks of K and V by all tokens up to their end, the least recently used of which go first (as vLLM's automatic prefix caching).

    For one task's weights only: another's K and V of the same tokens are others. Not for several threads.
    tokens: room for so many; 0 keeps nothing.
    """

    def __init__(self, tokens: int):
        self.capacity = tokens // BLOCK
        self._blocks: OrderedDict[tuple[int, tuple[int, ...]], tuple[int, Tensor]] = OrderedDict()
        self._names = itertools.count(1)
        self.asked = self.found = 0
        """Tokens that prompts had, and those of them that were here."""

    def match(self, ids: list[int]) -> list[Tensor]:
        """The blocks of the longest beginning of ``ids`` that is here, each [layers, 2, kv_heads, BLOCK, head_dim]."""
        keys, blocks, parent = [], [], 0
        for key in self._keys(ids):
            found = self._blocks.get((parent, key))
            if found is None:
                break
            keys.append((parent, key))
            parent, block = found
            blocks.append(block)
        self._touch(keys)
        self.asked += len(ids)
        self.found += len(blocks) * BLOCK
        return blocks

    def add(self, ids: list[int], kv: Tensor) -> None:
        """Keep a prompt's K and V [layers, 2, kv_heads, len(ids), head_dim], copied, up to its last whole block."""
        keys, parent = [], 0
        for i, key in enumerate(itertools.islice(self._keys(ids), self.capacity)):
            if (parent, key) not in self._blocks:
                self._blocks[parent, key] = next(self._names), kv[..., i * BLOCK : (i + 1) * BLOCK, :].clone()
            keys.append((parent, key))
            parent = self._blocks[parent, key][0]
        self._touch(keys)
        while len(self._blocks) > self.capacity:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Forget all blocks."""
        self._blocks.clear()

    def _touch(self, keys: list[tuple[int, tuple[int, ...]]]) -> None:
        """Mark as used, the beginning last: without it what follows could not be found."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)

    @staticmethod
    def _keys(ids: list[int]) -> list[tuple[int, ...]]:
        return [tuple(ids[at : at + BLOCK]) for at in range(0, len(ids) - BLOCK + 1, BLOCK)]
