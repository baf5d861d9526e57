"""Load generators: who sends a run's requests. Both give the same samples of the same list."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

from sun_client.client import SunClient
from sun_perf.samples import Sample
from sun_perf.workload import Request


class Load(Protocol):
    """Sends requests to the model `sun` at a gRPC url (host:port) and waits for all. Raises an error if any fails."""

    name: str

    def closed(self, url: str, requests: Sequence[Request], concurrency: int) -> list[Sample]:
        """Closed loop: always ``concurrency`` requests in flight, as long as there are any left."""

    def open(self, url: str, requests: Sequence[Request], gaps: Sequence[float]) -> list[Sample]:
        """Open loop: each request ``gaps`` seconds after the one before, whatever has been answered."""


class OwnLoad:
    """Our own client, a thread per request in flight: the check on perf_analyzer, and for where that is not to be had."""

    name = "sun_client"

    def closed(self, url: str, requests: Sequence[Request], concurrency: int) -> list[Sample]:
        """See `Load.closed`."""
        with _asking(url, concurrency) as (client, pool):
            return list(pool.map(lambda request: _ask(client, request), requests))

    def open(self, url: str, requests: Sequence[Request], gaps: Sequence[float]) -> list[Sample]:
        """See `Load.open`."""
        with _asking(url, len(requests)) as (client, pool):
            due, futures = time.perf_counter(), []
            for request, gap in zip(requests, gaps, strict=True):
                due += gap
                time.sleep(max(0.0, due - time.perf_counter()))
                futures.append(pool.submit(_ask, client, request))
            return [future.result() for future in futures]


def check(samples: Sequence[Sample], requests: Sequence[Request]) -> None:
    """Raise RuntimeError unless the samples are of exactly these requests: as many of each task and length."""
    got = sorted((s.task, len(s.tokens)) for s in samples)
    asked = sorted((r.task, r.tokens) for r in requests)
    if got != asked:
        odd = next((pair for pair in zip(got, asked, strict=False) if pair[0] != pair[1]), (len(got), len(asked)))
        raise RuntimeError(f"load: the answers are not of the work that was asked for; first difference: got {odd[0]}, asked {odd[1]}")


@contextmanager
def _asking(url: str, threads: int) -> Iterator[tuple[SunClient, ThreadPoolExecutor]]:
    """A client and threads that use it. An error or interrupt inside ends their requests, where a plain pool would wait for all."""
    client, pool = SunClient(url), ThreadPoolExecutor(threads)
    try:
        yield client, pool
    finally:
        client.close()
        pool.shutdown(cancel_futures=True)


def _ask(client: SunClient, request: Request) -> Sample:
    sent, tokens = time.perf_counter(), []
    for piece in client.stream(request.task, request.prompt, sampling=request.sampling):
        tokens += [time.perf_counter()] * len(piece.token_ids)
    return Sample(request.task, sent, tuple(tokens))
