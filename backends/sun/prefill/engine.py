"""Prefill: prompts of one task in, KV tickets out. Batches concurrent prompts within a token budget."""

from __future__ import annotations

import errno
import threading
from collections import deque
from concurrent.futures import Future

import torch

from sun import gpu
from sun.handoff.kv import NAMES, kv_tensor
from sun.handoff.ticket import ITEMSIZE, describe
from sun.handoff.transport import NO_ROOM, Transport
from sun.model.llama import Llama
from sun.model.manifest import TaskManifest
from sun.model.quantise import FULL
from sun.prefill.device import DeviceModule
from sun.prefill.executor import Executor, TorchExecutor
from sun.prefill.jobs import Chunk, Job, plan, plan_whole
from sun.prefill.prefix_cache import BLOCK, PrefixCache


class PrefillEngine:
    """Runs a task's prefill module in a thread of its own and publishes each prompt's KV.

    model: its linear layers are packed in place if its scheme is a low-bit one. task: as tickets are to carry it.
    token_budget: most tokens in one pass; longer prompts are processed in chunks of it. prefix_tokens: see `PrefixCache`.
    executor: what runs a pass in place of torch. One that does not continue gets whole prompts, and the cache stays empty. Raises ValueError for a task
    whose prefill module runs all of a prompt, if the executor does not give what comes of it.
    """

    def __init__(self, model: Llama | DeviceModule, task: TaskManifest, transport: Transport, token_budget: int = 512, threads: int | None = None,
                 prefix_tokens: int = 0, executor: Executor | None = None):
        if executor is None and isinstance(model, Llama) and model.scheme != FULL:
            from sun.prefill.integer import pack_linears  # here, because numba takes memory that a float32 module has no use for

            pack_linears(model, alone=threads == 1)
        self.executor = executor or TorchExecutor(model)
        if task.whole_prompt and not self.executor.states:
            raise ValueError(f"executor: gives K and V alone; task {task.name!r} needs the last token's state as well (whole_prompt)")
        self.hidden = model.base.hidden if task.whole_prompt else 0
        self.cache = PrefixCache(prefix_tokens if self.executor.continues else 0)
        self._plan = plan if self.executor.continues else plan_whole
        self.model, self.task, self.transport = model, task, transport
        self.token_budget, self.threads = token_budget, threads
        if self.executor.device.type != "cpu":
            self._warm_up()
        self._jobs: deque[Job] = deque()
        self._passes = 0
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"prefill-{task.name}", daemon=True)
        self._thread.start()

    def submit(self, ids: list[int]) -> Future[list[bytes]]:
        """Queue token ids x1..x(n-1) (none is legal: n = 1), or x1..xn for a task with `whole_prompt`; the future gives the shipment.

        Raises ValueError naming the limit for ids outside the vocabulary or a prompt past the context, or past what the executor runs.
        """
        base = self.model.base
        most = min(base.max_context - (1 if self.hidden else 2), self.executor.max_tokens or base.max_context)
        if len(ids) > most:
            raise ValueError(f"input_ids: {len(ids)} tokens, the limit is {most}")
        if self.hidden and not ids:
            raise ValueError("input_ids: no tokens; this task's prefill module runs all of a prompt, at least one token")
        base.check_ids("input_ids", ids)
        job = Job(torch.tensor(ids, dtype=torch.int64), Future(), whole=bool(self.hidden))
        with self._wake:
            if self._closed:
                raise RuntimeError("the prefill engine is shutting down")
            self._jobs.append(job)
            self._wake.notify()
        return job.future

    def progress(self) -> int | None:
        """How many passes it has begun; None if no prompt is here. See `Watchdog`."""
        with self._wake:
            return self._passes if self._jobs else None

    def close(self) -> None:
        """Finish queued prompts and stop."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Run the largest pass, of a whole prompt and of one's rest, before anybody waits for one: a device's libraries and kernels are loaded when
        they are first used, and memory that does not suffice shows here."""
        geometry, tokens = self.model.geometry, min(self.token_budget, self.model.base.max_context - 2)
        kv = torch.empty(geometry.layers, 2, geometry.kv_heads, tokens, geometry.head_dim, dtype=self.executor.dtype, device=self.executor.device)
        for done in (0, tokens // 2):
            job = Job(torch.zeros(tokens, dtype=torch.int64), Future(), done, kv=kv, whole=bool(self.hidden))
            self.executor.run([Chunk(job, job.left)])

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
                chunks = self._plan(self._jobs, self.token_budget)
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
            ids = job.ids.tolist()
            job.prefix = self.cache.match(ids[:-1] if job.whole else ids)  # the state of the last token is no part of it
            job.done = BLOCK * len(job.prefix)

    def _reserve(self, job: Job) -> bool:
        """Make room for a prompt's KV when its first chunk comes up; a prompt without room fails alone."""
        if job.publication is None:
            geometry, dtype, device = self.model.geometry, self.executor.dtype, self.executor.device
            try:
                job.publication = self.transport.reserve(geometry.kv_bytes(len(job.ids), dtype.itemsize) + ITEMSIZE["float32"] * self.hidden)
                job.place = kv_tensor(job.publication.buffer, (geometry.layers, 2, geometry.kv_heads, len(job.ids), geometry.head_dim), dtype)
                job.kv = job.place if job.place.device == device else torch.empty_like(job.place, device=device)
                if job.prefix:
                    job.kv[..., : job.done, :] = torch.cat(job.prefix, dim=-2)
            except ValueError as error:  # it never has room
                self._drop(job, error)
                return False
            except Exception as error:
                number, why = (error.errno, error.strerror) if isinstance(error, OSError) else (errno.ENOMEM, str(error) or type(error).__name__)
                self._drop(job, OSError(number, f"{NO_ROOM} of {len(job.ids)} tokens ({self.transport.name}): {why}"))
                return False
            job.prefix = []
        return True

    def _ship(self, job: Job) -> None:
        assert job.publication is not None
        kv, place = job.kv, job.place
        job.kv = job.place = torch.empty(0)
        try:
            if place is not kv:
                place.copy_(kv)
            if job.whole:
                kv_tensor(job.publication.buffer, (self.hidden,), offset=place.nbytes).copy_(job.hidden)
            shipment = job.publication.ship(lambda kv, transport, location: describe(
                self.model.base, self.task, len(job.ids), kv, transport, location, NAMES[self.executor.dtype], self.hidden))
        except Exception as error:
            return self._drop(job, error)
        self._leave(job)
        job.future.set_result(shipment)
        try:
            self.cache.add(job.ids.tolist(), kv)  # not before: nobody need wait for the copy
        except (MemoryError, RuntimeError):  # torch's word for want of memory; prompts go on without what was kept
            self.cache.clear()

    def _drop(self, job: Job, error: Exception) -> None:
        gpu.end_if_lost("the prefill module", self.executor.device, error)
        self._leave(job)
        job.kv = job.place = torch.empty(0)
        if job.publication is not None:
            job.publication.drop()
        job.future.set_exception(error)

    def _leave(self, job: Job) -> None:
        with self._wake:
            self._jobs.remove(job)

    @torch.inference_mode()
    def _pass(self, chunks: list[Chunk]) -> None:
        self._passes += 1
        chunks = [chunk for chunk in chunks if chunk.size]
        if not chunks:
            return
        self.executor.run(chunks)
        for chunk in chunks:
            chunk.job.done += chunk.size
