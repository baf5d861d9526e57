"""One decode step of the shared module. A device or a number format is one implementation of `Executor`."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sun.decode.kv_pool import KVPool, Slot
from sun.model.llama import Llama

REPLAY_ROWS = 32
"""Tokens of a sequence that are replayed between two steps, all at once: an executor takes so many at least."""


class Executor(Protocol):
    """Runs one token of each sequence through the decode module."""

    def step(self, tokens: list[int], positions: list[int], slots: list[Slot]) -> Tensor:
        """Logits [batch, vocab] float32, on the executor's device, of ``tokens`` [batch] at ``positions`` [batch].

        Writes each token's K and V at its position of its slot and attends to all up to it. A slot may come several times,
        in the order of its positions.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [batch, vocab] float32, on the executor's device, of states after the last layer ``hidden`` [batch, hidden] (float32, on the CPU)."""


class TorchExecutor:
    """Plain torch in float32 on the CPU: weights memory-mapped and shared with every process on the host.

    Attention runs sequence by sequence on the slots in place: no padding, no gathering, and nothing of a sequence's
    result depends on its neighbours.
    """

    def __init__(self, model: Llama, pool: KVPool):
        self.model, self.pool = model, pool

    @torch.inference_mode()
    def step(self, tokens: list[int], positions: list[int], slots: list[Slot]) -> Tensor:
        """See `Executor.step`."""
        kv_heads, data = self.model.geometry.kv_heads, self.pool.data
        at = torch.tensor([slot.start + position for slot, position in zip(slots, positions, strict=True)])
        ranges = [(slot.start, slot.start + position + 1) for slot, position in zip(slots, positions, strict=True)]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = data[layer]
            keys[:, at] = k.transpose(0, 1)
            values[:, at] = v.transpose(0, 1)
            # The query heads that share a K and V head become its queries: grouped attention without copies of K and V.
            grouped = q.unflatten(1, (kv_heads, -1))
            rows = [
                F.scaled_dot_product_attention(grouped[i : i + 1], keys[None, :, a:b], values[None, :, a:b])
                for i, (a, b) in enumerate(ranges)
            ]
            return torch.cat(rows).flatten(1)

        hidden = self.model.hidden(torch.tensor(tokens), torch.tensor(positions), attend)
        return self.model.logits(hidden)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `Executor.logits`."""
        return self.model.logits(hidden)
