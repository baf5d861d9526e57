"""A fleet and what becomes of a list of requests on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import simpy

from sun.router.policy import LeastTokens, Partitioned, Policy, make_policy
from sun.slots import KV_TOKENS
from sun_perf.simulation.costs import PrefillTime, StepTime
from sun_perf.simulation.outcome import Outcome
from sun_perf.simulation.traffic import Request
from sun_perf.simulation.workers import DecodeWorker, PrefillWorker, Sequence


@dataclass(frozen=True)
class Limits:
    """A worker's settings: most sequences in a step and tokens of the KV pool (decode), tokens of a pass (prefill)."""

    max_batch: int = 64
    kv_tokens: int = KV_TOKENS
    token_budget: int = 512

    def __post_init__(self) -> None:
        for name, value in (("max-batch", self.max_batch), ("kv-tokens", self.kv_tokens), ("token-budget", self.token_budget)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, must be at least 1")

    def check(self, requests: list[Request]) -> None:
        """Raise ValueError if a request could never be admitted, as a decode worker would."""
        largest = max((r.prompt + r.max_tokens - 1 for r in requests), default=0)
        if largest > self.kv_tokens:
            raise ValueError(f"kv-tokens: {self.kv_tokens}, but a prompt and its max-tokens together take {largest}")


@dataclass(frozen=True)
class Fleet:
    """Workers of both kinds.

    prefill: task -> its prefill workers; None: as many as there are prompts, so that none waits. decode: workers of one pool, or
    task -> workers of its own (partitioned: the conventional baseline). policy: of the pool, by its name in `sun.router.policy`.
    """

    steps: StepTime
    prefills: PrefillTime
    limits: Limits
    decode: int | Mapping[str, int]
    prefill: Mapping[str, int] | None = None
    policy: str = "least_tokens"

    def run(self, requests: list[Request]) -> Outcome:
        """Simulate until every request has ended. Deterministic. Raises ValueError for one that fits no worker."""
        self.limits.check(requests)
        return _Run(self, requests).outcome()


class _Run:
    """One simulation: the router, as far as it matters, and its workers."""

    def __init__(self, fleet: Fleet, requests: list[Request]):
        self.fleet, self.env = fleet, simpy.Environment()
        self.sequences = [Sequence(request) for request in requests]
        self.decodes: list[DecodeWorker] = []
        self.policy, self.pools = self._pools({request.task for request in requests})
        self.prefills: dict[str, dict[str, PrefillWorker]] = {
            task: {name: PrefillWorker(self.env, name, fleet.prefills, fleet.limits.token_budget, self._published)
                   for name in (f"prefill_{task}_{i}" for i in range(count))}
            for task, count in (fleet.prefill or {}).items()}
        self.nearest = LeastTokens()
        self.unfinished = len(requests)
        self.env.process(self._arrivals())

    def outcome(self) -> Outcome:
        """Run it."""
        self.env.run()
        if self.unfinished:
            raise RuntimeError(f"{self.unfinished} requests never ended")
        prefills = [worker for workers in self.prefills.values() for worker in workers.values()]
        return Outcome.of(self.sequences, self.decodes, prefills)

    def _pools(self, tasks: set[str]) -> tuple[Policy, dict[str, dict[str, DecodeWorker]]]:
        """The policy, and for each task the workers among which it picks."""
        decode = self.fleet.decode
        if not isinstance(decode, Mapping):
            pool = self._workers("decode", decode)
            return make_policy(self.fleet.policy), dict.fromkeys(tasks, pool)
        pools = {task: self._workers(f"decode_{task}", count) for task, count in decode.items()}
        return Partitioned({task: list(pool) for task, pool in pools.items()}), pools

    def _workers(self, name: str, count: int) -> dict[str, DecodeWorker]:
        fleet, limits = self.fleet, self.fleet.limits
        made = {f"{name}_{i:04}": DecodeWorker(self.env, f"{name}_{i:04}", fleet.steps, fleet.prefills, limits.kv_tokens, limits.max_batch, self._ended)
                for i in range(count)}
        self.decodes += made.values()
        return made

    def _arrivals(self) -> Iterator[simpy.Event]:
        for sequence in self.sequences:
            yield self.env.timeout(max(0.0, 1e3 * sequence.request.at - self.env.now))
            task, tokens = sequence.request.task, sequence.request.prompt - 1
            if self.fleet.prefill is None:
                self.env.process(self._unqueued(sequence, self.fleet.prefills.alone(tokens, self.fleet.limits.token_budget)))
            else:
                workers = self.prefills[task]
                workers[self.nearest.pick(task, {name: worker.load for name, worker in workers.items()})].submit(sequence)

    def _unqueued(self, sequence: Sequence, ms: float) -> Iterator[simpy.Event]:
        yield self.env.timeout(ms)
        self._published(sequence)

    def _published(self, sequence: Sequence) -> None:
        sequence.prefilled = self.env.now
        pool = self.pools[sequence.request.task]
        pool[self.policy.pick(sequence.request.task, {name: worker.load for name, worker in pool.items()}, sequence.need)].admit(sequence)

    def _ended(self, sequence: Sequence) -> None:
        self.unfinished -= 1
