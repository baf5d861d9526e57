"""The worker's KV memory: one preallocated block, handed out in contiguous slots by a token budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sun.memory import GIB, available
from sun.slots import Slot, Slots

if TYPE_CHECKING:
    from sun.model.manifest import Geometry


def free_bytes(device: torch.device) -> int:
    """Of a device's memory; what this process's torch holds of a GPU's without using it counts as free."""
    if device.type == "cpu":
        return available()
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class KVPool:
    """K and V of all sequences, [layers, 2, kv_heads, budget + spare, head_dim]; a slot is a range of the budget.

    A slot is contiguous so that attention reads it in place. It is taken for a sequence's whole possible length, so a
    sequence that was admitted always fits. spare: tokens after the budget that are in no slot, for rows that pad a batch.
    Raises MemoryError naming kv_tokens if the device has no room for it: of the CPU's, pages are taken only when they are first written, so that
    a pool that is too large would be its process's death much later, and a GPU's own error names no setting.
    """

    def __init__(self, geometry: Geometry, budget: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, spare: int = 0):
        if budget < 1:
            raise ValueError(f"kv_tokens: must be 1 or more, got {budget}")
        self._check_room(geometry, budget, torch.device(device), dtype)
        self.budget, self.spare = budget, spare
        self.data = torch.empty(geometry.layers, 2, geometry.kv_heads, budget + spare, geometry.head_dim, device=device, dtype=dtype)
        # Its own, so that steps need not wait for a prompt's KV.
        self._stream = torch.cuda.Stream(self.data.device) if self.data.is_cuda else None
        self._slots = Slots(budget)

    @staticmethod
    def _check_room(geometry: Geometry, budget: int, device: torch.device, dtype: torch.dtype) -> None:
        token, free = geometry.kv_bytes(1, dtype.itemsize), free_bytes(device)
        if budget * token > free:
            raise MemoryError(f"kv_tokens: {budget} tokens of KV need {budget * token / GIB:.1f} GiB, {free / GIB:.1f} are free; {free // token} would fit")

    @property
    def free_tokens(self) -> int:
        """Tokens in no slot (not all in one piece, perhaps)."""
        return self._slots.free

    def take(self, size: int) -> Slot | None:
        """A slot of ``size`` tokens from the tightest gap that holds it, or None."""
        return self._slots.take(size)

    def give_back(self, slot: Slot) -> None:
        """See `Slots.give_back`."""
        self._slots.give_back(slot)

    def view(self, slot: Slot, tokens: int) -> Tensor:
        """The first ``tokens`` tokens of a slot, [layers, 2, kv_heads, tokens, head_dim], in place."""
        return self.data[:, :, :, slot.start : slot.start + tokens]

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What this thread does on the pool's device runs beside the steps, which need not wait for it; it is done at the end."""
        if self._stream is None:
            yield
            return
        # What runs now may still write to a slot for a sequence that has left: a replay is not waited for.
        self._stream.wait_stream(torch.cuda.current_stream(self.data.device))
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    def fill(self, slot: Slot, kv: Tensor) -> None:
        """Copy a prompt's KV [layers, 2, kv_heads, tokens, head_dim] from the CPU or the pool's device, in float32 or bf16, to the beginning of a slot; it is there on return."""
        place = self.view(slot, kv.shape[3])
        with self.beside():
            # In one piece to the device, and rounded and spread over the pool's heads there.
            place.copy_(kv.to(self.data.device, non_blocking=True))
