"""Batches of padded prompts, computed elsewhere: executor ``triton`` by a model that Triton itself serves, ``tensorrt`` by a plan that runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sun.model.manifest import BaseManifest, TaskManifest
from sun.prefill.exported import ExportManifest
from sun.prefill.jobs import Chunk

Compute = Callable[[Tensor], Sequence[Tensor]]
"""Token ids [batch, length] -> K and V [batch, layers, 2, kv_heads, length, head_dim], and what `sun.prefill.exported.outputs` has besides."""


def batches(chunks: list[Chunk], most: int) -> Iterator[list[Chunk]]:
    """Chunks of similar lengths together, so that little is padding: at most ``most``, and none shorter than half of the longest."""
    batch: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: -chunk.size):
        if batch and (len(batch) == most or 2 * chunk.size < batch[0].size):
            yield batch
            batch = []
        batch.append(chunk)
    if batch:
        yield batch


class PaddedExecutor:
    """Pads whole prompts to batches and computes them elsewhere.

    folder: of the exported model, for its `export.json`, whose limits hold. Raises ValueError if it is not one of the task's weights, or not in ``format``.
    """

    continues = states = False
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, compute: Compute, folder: str | Path, base: BaseManifest, task: TaskManifest, format: str | None = None):
        exported = ExportManifest.load(folder)
        exported.check(base, task, format)
        self.compute, self.max_batch, self.max_tokens = compute, exported.max_batch, exported.max_tokens
        self.states, self._hidden = exported.states, base.hidden

    def run(self, chunks: list[Chunk]) -> None:
        """See `Executor.run`."""
        for batch in batches(chunks, self.max_batch):
            ids = torch.zeros(len(batch), batch[0].size, dtype=torch.int64)
            for row, chunk in zip(ids, batch, strict=True):
                row[: chunk.size] = chunk.ids
            kv, *states = self.compute(ids)
            self._check(kv, (len(batch), *batch[0].job.kv.shape))
            for row, chunk in zip(kv, batch, strict=True):
                chunk.job.kv.copy_(row[..., : chunk.size, :])
            if self.states:
                self._check(states[0], (*ids.shape, self._hidden))
                for row, chunk in zip(states[0], batch, strict=True):
                    chunk.job.hidden = row[chunk.size - 1].clone()

    @staticmethod
    def _check(tensor: Tensor, expected: tuple[int, ...]) -> None:
        if tensor.shape != expected or tensor.dtype is not torch.float32:
            raise RuntimeError(f"the exported model gave {list(tensor.shape)} {tensor.dtype}, expected {list(expected)} torch.float32")
