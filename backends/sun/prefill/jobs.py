"""Prompts on their way through prefill, and which of their tokens run in the next pass."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sun.handoff.transport import Publication


@dataclass(eq=False)  # a job is itself alone: comparing tensors of different prompts raises
class Job:
    """One prompt on its way: ``done`` of its ``ids`` have their K and V in ``kv``, or the first of them in ``prefix`` until there is one.

    place: ``kv`` as it lies where it is published from; ``kv`` itself if the executor can write there.
    whole: these are all of the prompt's tokens, x1..xn, and ``hidden`` [hidden] (float32) becomes the last one's state after the last layer.
    """

    ids: Tensor
    future: Future[list[bytes]]
    done: int = 0
    prefix: list[Tensor] | None = None
    publication: Publication | None = None
    kv: Tensor = field(default_factory=lambda: torch.empty(0))
    place: Tensor = field(default_factory=lambda: torch.empty(0))
    whole: bool = False
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def left(self) -> int:
        """Tokens still to run."""
        return len(self.ids) - self.done


@dataclass(frozen=True)
class Chunk:
    """Tokens ``job.ids[job.done : job.done + size]`` in one pass."""

    job: Job
    size: int

    @property
    def ids(self) -> Tensor:
        """Its tokens [size], int64."""
        return self.job.ids[self.job.done : self.until]

    @property
    def until(self) -> int:
        """Where it ends in the prompt."""
        return self.job.done + self.size

    @property
    def ends(self) -> bool:
        """Whether the state of its last token is wanted."""
        return self.job.whole and self.until == len(self.job.ids)


def plan(jobs: deque[Job], budget: int) -> list[Chunk]:
    """Split a pass of ``budget`` tokens: the oldest prompt first, but only half of it while others wait.

    So a long prompt always advances and short ones behind it need not wait for its end.
    """
    chunks: list[Chunk] = []
    left = budget
    for job in jobs:
        share = (budget + 1) // 2 if not chunks and len(jobs) > 1 else left
        size = min(job.left, share, left)
        chunks.append(Chunk(job, size))
        left -= size
        if left <= 0:
            break
    if left > 0 and chunks and chunks[0].size < chunks[0].job.left:
        chunks[0] = Chunk(chunks[0].job, min(chunks[0].job.left, chunks[0].size + left))
    return chunks


def plan_whole(jobs: deque[Job], budget: int) -> list[Chunk]:
    """Whole prompts for a pass, the oldest first: as many as ``budget`` tokens hold, but one at least, however long."""
    chunks: list[Chunk] = []
    left = budget
    for job in jobs:
        if chunks and job.left > left:
            break
        chunks.append(Chunk(job, job.left))
        left -= job.left
    return chunks
