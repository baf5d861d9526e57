"""The worker's KV memory: one preallocated block, handed out in contiguous slots by a token budget."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sun.memory import GIB, available

if TYPE_CHECKING:
    from sun.model.manifest import Geometry


@dataclass(frozen=True, order=True)
class Slot:
    """Tokens ``start`` to ``start + size`` of the pool: one sequence's prompt and all it may generate."""

    start: int
    size: int


class KVPool:
    """K and V of all sequences, [layers, 2, kv_heads, budget + spare, head_dim]; a slot is a range of the budget.

    A slot is contiguous so that attention reads it in place. It is taken for a sequence's whole possible length, so a
    sequence that was admitted always fits. spare: tokens after the budget that are in no slot, for rows that pad a batch.
    Raises MemoryError naming kv_tokens if the CPU has no room for it: pages are taken only when they are first written, so that a pool
    that is too large would be its process's death much later.
    """

    def __init__(self, geometry: Geometry, budget: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, spare: int = 0):
        if budget < 1:
            raise ValueError(f"kv_tokens: must be 1 or more, got {budget}")
        if torch.device(device).type == "cpu":
            self._check_room(geometry, budget)
        self.budget, self.spare = budget, spare
        self.data = torch.empty(geometry.layers, 2, geometry.kv_heads, budget + spare, geometry.head_dim, device=device, dtype=dtype)
        # Its own, so that steps need not wait for a prompt's KV.
        self._stream = torch.cuda.Stream(self.data.device) if self.data.is_cuda else None
        self._free = [Slot(0, budget)]

    @staticmethod
    def _check_room(geometry: Geometry, budget: int) -> None:
        need, free = geometry.kv_bytes(budget, 4), available()
        if need > free:
            raise MemoryError(f"kv_tokens: {budget} tokens of KV need {need / GIB:.1f} GiB, {free / GIB:.1f} are free; "
                              f"{free // geometry.kv_bytes(1, 4)} would fit")

    @property
    def free_tokens(self) -> int:
        """Tokens in no slot (not all in one piece, perhaps)."""
        return sum(slot.size for slot in self._free)

    def take(self, size: int) -> Slot | None:
        """A slot of ``size`` tokens from the tightest gap that holds it, or None."""
        gap = min((s for s in self._free if s.size >= size), key=lambda s: s.size, default=None)
        if gap is None:
            return None
        self._free.remove(gap)
        if gap.size > size:
            bisect.insort(self._free, Slot(gap.start + size, gap.size - size))
        return Slot(gap.start, size)

    def give_back(self, slot: Slot) -> None:
        """Return a slot, joining it with free neighbours. Raises ValueError if any of it was free already."""
        at = bisect.bisect(self._free, slot)
        before = self._free[at - 1] if at else None
        after = self._free[at] if at < len(self._free) else None
        start, end = slot.start, slot.start + slot.size
        if (before and before.start + before.size > start) or (after and after.start < end) or end > self.budget:
            raise ValueError(f"{slot} was not taken")
        if after and after.start == end:
            self._free.pop(at)
            end = after.start + after.size
        if before and before.start + before.size == start:
            self._free.pop(at - 1)
            start = before.start
        bisect.insort(self._free, Slot(start, end - start))

    def view(self, slot: Slot, tokens: int) -> Tensor:
        """The first ``tokens`` tokens of a slot, [layers, 2, kv_heads, tokens, head_dim], in place."""
        return self.data[:, :, :, slot.start : slot.start + tokens]

    def fill(self, slot: Slot, kv: Tensor) -> None:
        """Copy a prompt's KV [layers, 2, kv_heads, tokens, head_dim] from the CPU or the pool's device, in float32 or bf16, to the beginning of a slot; it is there on return."""
        place = self.view(slot, kv.shape[3])
        if self._stream is None:
            place.copy_(kv)
            return
        # What runs now may still write to the slot for a sequence that has left: a replay is not waited for.
        self._stream.wait_stream(torch.cuda.current_stream(self.data.device))
        with torch.cuda.stream(self._stream):
            # In one piece to the device, and rounded and spread over the pool's heads there.
            place.copy_(kv.to(self.data.device, non_blocking=True))
        self._stream.synchronize()
