"""Prefill: prompts of one task in, KV tickets out. Batches concurrent prompts within a token budget."""

from __future__ import annotations

import errno
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sun.handoff.kv import kv_tensor
from sun.handoff.ticket import describe
from sun.handoff.transport import NO_ROOM, Publication, Transport
from sun.model.llama import Llama
from sun.model.manifest import TaskManifest
from sun.prefill.prefix_cache import BLOCK, PrefixCache


@dataclass(eq=False)  # a job is itself alone: comparing tensors of different prompts raises
class Job:
    """One prompt on its way: ``done`` of its ``ids`` have their K and V in ``kv``, or the first of them in ``prefix`` until there is one."""

    ids: Tensor
    future: Future[list[bytes]]
    done: int = 0
    prefix: list[Tensor] | None = None
    publication: Publication | None = None
    kv: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def left(self) -> int:
        """Tokens still to run."""
        return len(self.ids) - self.done


@dataclass(frozen=True)
class Chunk:
    """Tokens ``job.ids[job.done : job.done + size]`` in one pass."""

    job: Job
    size: int


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


class PrefillEngine:
    """Runs a task's prefill module in a thread of its own and publishes each prompt's KV.

    token_budget: most tokens in one pass; longer prompts are processed in chunks of it. prefix_tokens: see `PrefixCache`.
    """

    def __init__(self, model: Llama, task: TaskManifest, transport: Transport, token_budget: int = 512, threads: int | None = None,
                 prefix_tokens: int = 0):
        self.cache = PrefixCache(prefix_tokens)
        self.model, self.task, self.transport = model, task, transport
        self.token_budget, self.threads = token_budget, threads
        self._jobs: deque[Job] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"prefill-{task.name}", daemon=True)
        self._thread.start()

    def submit(self, ids: list[int]) -> Future[list[bytes]]:
        """Queue token ids x1..x(n-1) (none is legal: n = 1); the future gives the shipment.

        Raises ValueError naming the limit for ids outside the vocabulary or a prompt past the context.
        """
        base = self.model.base
        if len(ids) > base.max_context - 2:
            raise ValueError(f"input_ids: {len(ids)} tokens, the limit is {base.max_context - 2}")
        base.check_ids("input_ids", ids)
        job = Job(torch.tensor(ids, dtype=torch.int64), Future())
        with self._wake:
            if self._closed:
                raise RuntimeError("the prefill engine is shutting down")
            self._jobs.append(job)
            self._wake.notify()
        return job.future

    def close(self) -> None:
        """Finish queued prompts and stop."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                for job in self._jobs:
                    self._match(job)
                chunks = plan(self._jobs, self.token_budget)
            chunks = [chunk for chunk in chunks if self._reserve(chunk.job)]
            self._try(chunks)
            for chunk in chunks:
                if not chunk.job.left and not chunk.job.future.done():
                    self._ship(chunk.job)

    def _try(self, chunks: list[Chunk]) -> None:
        """Run a pass. If it fails, for want of memory say, its prompts run one by one: who fails alone is who gets the error."""
        try:
            self._pass(chunks)
        except Exception as error:
            if len(chunks) == 1:
                return self._drop(chunks[0].job, error)
            for chunk in chunks:
                self._try([chunk])

    def _match(self, job: Job) -> None:
        """Leave out what the cache has of a new prompt."""
        if job.prefix is None:
            job.prefix = self.cache.match(job.ids.tolist())
            job.done = BLOCK * len(job.prefix)

    def _reserve(self, job: Job) -> bool:
        """Make room for a prompt's KV when its first chunk comes up; a prompt without room fails alone."""
        if job.publication is None:
            geometry = self.model.geometry
            try:
                job.publication = self.transport.reserve(geometry.kv_bytes(len(job.ids), 4))
                job.kv = kv_tensor(job.publication.buffer, (geometry.layers, 2, geometry.kv_heads, len(job.ids), geometry.head_dim))
                if job.prefix:
                    job.kv[..., : job.done, :] = torch.cat(job.prefix, dim=-2)
            except Exception as error:
                number, why = (error.errno, error.strerror) if isinstance(error, OSError) else (errno.ENOMEM, str(error) or type(error).__name__)
                self._drop(job, OSError(number, f"{NO_ROOM} of {len(job.ids)} tokens ({self.transport.name}): {why}"))
                return False
            job.prefix = []
        return True

    def _ship(self, job: Job) -> None:
        assert job.publication is not None
        kv, job.kv = job.kv, torch.empty(0)
        try:
            shipment = job.publication.ship(
                lambda kv, transport, location: describe(self.model.base, self.task, len(job.ids), kv, transport, location))
        except Exception as error:
            return self._drop(job, error)
        self._leave(job)
        job.future.set_result(shipment)
        try:
            self.cache.add(job.ids.tolist(), kv)  # not before: nobody need wait for the copy
        except (MemoryError, RuntimeError):  # torch's word for want of memory; prompts go on without what was kept
            self.cache.clear()

    def _drop(self, job: Job, error: Exception) -> None:
        self._leave(job)
        job.kv = torch.empty(0)
        if job.publication is not None:
            job.publication.drop()
        job.future.set_exception(error)

    def _leave(self, job: Job) -> None:
        with self._wake:
            self._jobs.remove(job)

    @torch.inference_mode()
    def _pass(self, chunks: list[Chunk]) -> None:
        chunks = [chunk for chunk in chunks if chunk.size]
        if not chunks:
            return
        ids = torch.cat([c.job.ids[c.job.done : c.job.done + c.size] for c in chunks])
        positions = torch.cat([torch.arange(c.job.done, c.job.done + c.size) for c in chunks])
        sizes = [c.size for c in chunks]

        def keep(layer: int, k: Tensor, v: Tensor) -> None:
            for chunk, new_k, new_v in zip(chunks, k.split(sizes), v.split(sizes), strict=True):
                at = slice(chunk.job.done, chunk.job.done + chunk.size)
                chunk.job.kv[layer, 0, :, at] = new_k.transpose(0, 1)
                chunk.job.kv[layer, 1, :, at] = new_v.transpose(0, 1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keep(layer, k, v)
            rows = []
            for chunk, chunk_q, mask in zip(chunks, q.split(sizes), masks, strict=True):
                until = chunk.job.done + chunk.size
                keys, values = chunk.job.kv[layer, :, :, :until].unbind(0)
                out = F.scaled_dot_product_attention(
                    chunk_q.transpose(0, 1).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0),
                    attn_mask=mask, is_causal=mask is None, enable_gqa=True)
                rows.append(out.squeeze(0).transpose(0, 1).flatten(1))
            return torch.cat(rows)

        masks = [self._mask(c) for c in chunks]
        self.model.fill(ids, positions, attend, keep)
        for chunk in chunks:
            chunk.job.done += chunk.size

    @staticmethod
    def _mask(chunk: Chunk) -> Tensor | None:
        """A later chunk sees all before it; a first chunk is plainly causal, which needs no mask."""
        if chunk.job.done == 0:
            return None
        until = chunk.job.done + chunk.size
        return torch.arange(until) <= torch.arange(chunk.job.done, until).unsqueeze(1)
