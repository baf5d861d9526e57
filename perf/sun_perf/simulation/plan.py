"""How many workers traffic needs for an SLO, with one decode pool (SUN) or with decode workers for each task (conventional)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sun_perf.simulation.costs import PrefillTime, StepTime
from sun_perf.simulation.fleet import Fleet, Limits
from sun_perf.simulation.outcome import Outcome, Slo
from sun_perf.simulation.traffic import Request, Traffic

WARM_UP = 0.1  # share of the requests, the first ones, that do not count: they found the fleet empty
SETTLED = 30  # a simulation lasts so many times what a request takes alone, or a queue that grows would not be seen
LEAST_REQUESTS = 2000


class Unreachable(ValueError):
    """An SLO that no number of workers can meet."""


@dataclass(frozen=True)
class Demand:
    """What is asked of a fleet, and what its workers can do. requests: fewest to simulate; seed: of the traffic."""

    traffic: Traffic
    slo: Slo
    steps: StepTime
    prefills: PrefillTime
    limits: Limits = Limits()
    requests: int = LEAST_REQUESTS
    seed: int = 0

    @cached_property
    def asked(self) -> list[Request]:
        """The requests, enough of them for the fleet to settle. Raises ValueError if one fits no worker."""
        first = self.traffic.requests(self.requests, self.seed)
        self.limits.check(first)
        count = max(self.requests, math.ceil(self.traffic.rate * SETTLED * np.mean([sum(self.alone(r)) for r in first]) / 1e3))
        return self.traffic.requests(count, self.seed)

    def alone(self, request: Request) -> tuple[float, float]:
        """A request that shares nothing: its TTFT, and the time from its first token to its last, ms. No fleet is faster."""
        steps, tokens = self.steps, request.prompt - 1
        ttft = self.prefills.alone(tokens, self.limits.token_budget) + self.prefills.pull(tokens) + steps.ms(1, request.prompt)
        return ttft, (request.output - 1) * steps.ms(1, request.prompt + request.output / 2)

    def check(self) -> None:
        """Raise Unreachable, naming the limit, if requests that share nothing miss the SLO already."""
        slo, counted = self.slo, self.asked[int(WARM_UP * len(self.asked)):]
        ttft = np.percentile([self.alone(r)[0] for r in counted], slo.percentile)
        tpot = np.percentile([self.alone(r)[1] / max(1, r.output - 1) for r in counted if r.output > 1] or [0.0], slo.percentile)
        for name, limit, best in (("ttft-ms", slo.ttft_ms, ttft), ("tpot-ms", slo.tpot_ms, tpot)):
            if best > limit:
                raise Unreachable(
                    f"{name}: no number of workers can meet {limit:g} ms at percentile {slo.percentile:g}: requests that share nothing take {best:.1f} ms there")

    def prefill_load(self) -> dict[str, float]:
        """Prefill workers that each task would keep busy without a break."""
        return self._load(lambda r: self.prefills.alone(r.prompt - 1, self.limits.token_budget))

    def decode_load(self) -> dict[str, float]:
        """Decode workers that each task would keep busy in batches as full as max_batch and the KV pool allow."""
        room = self.limits.kv_tokens / np.mean([r.prompt + r.max_tokens - 1 for r in self.asked])
        batch = max(1, min(self.limits.max_batch, int(room)))
        return self._load(lambda r: r.output * self.steps.ms(batch, r.prompt + r.output / 2) / batch)

    def fleet(self, decode: int | Mapping[str, int], prefill: Mapping[str, int] | None = None) -> Fleet:
        """A fleet of such workers; its arguments as there."""
        return Fleet(self.steps, self.prefills, self.limits, decode, prefill)

    def _load(self, cost: Callable[[Request], float]) -> dict[str, float]:
        loads = dict.fromkeys(self.traffic.shares, 0.0)
        for request in self.asked:
            loads[request.task] += cost(request) / 1e3 / self.asked[-1].at
        return loads


@dataclass(frozen=True)
class Plan:
    """Workers that meet a demand, and what the simulation of them gave. decode: of the pool, or by task."""

    prefill: Mapping[str, int] | None
    decode: int | Mapping[str, int]
    outcome: Outcome
    goodput: float

    @property
    def decode_workers(self) -> int:
        """All of them."""
        return self.decode if isinstance(self.decode, int) else sum(self.decode.values())

    @property
    def prefill_workers(self) -> int:
        """All of them."""
        return sum((self.prefill or {}).values())

    def numbers(self) -> dict[str, float | int]:
        """Its numbers by name, ms and per second."""
        workers = self.decode_workers + self.prefill_workers
        return {
            "prefill_workers": self.prefill_workers, "decode_workers": self.decode_workers, **self.outcome.summary(),
            "prefill_utilisation": float(self.outcome.prefill_busy.mean()) if len(self.outcome.prefill_busy) else math.nan,
            "goodput_per_s": self.goodput, "tokens_per_s_per_decode_worker": self.outcome.tokens_per_s / self.decode_workers,
            "tokens_per_s_per_worker": self.outcome.tokens_per_s / workers}


def plan(demand: Demand, partitioned: bool, prefill: bool = True) -> Plan:
    """The fewest decode workers that meet the SLO while no prompt waits for a prefill worker, then the fewest prefill workers for those.

    prefill False leaves the second half out. Raises Unreachable, or ValueError for demands that cannot be simulated.
    """
    demand.check()
    load = demand.decode_load()
    if partitioned:
        fleet, outcome = fewest(demand, load, lambda workers: demand.fleet(decode=workers))
    else:
        fleet, outcome = fewest(demand, {"pool": sum(load.values())}, lambda workers: demand.fleet(decode=workers["pool"]))
    if prefill:
        decode = fleet.decode
        fleet, outcome = fewest(demand, demand.prefill_load(), lambda workers: demand.fleet(decode=decode, prefill=workers))
    return Plan(fleet.prefill, fleet.decode, outcome, outcome.goodput(demand.slo))


def fewest(demand: Demand, loads: Mapping[str, float], fleet_of: Callable[[dict[str, int]], Fleet]) -> tuple[Fleet, Outcome]:
    """The fleet with the fewest workers, shared out by `allot`, that meets the SLO: a search outwards from what the load alone needs, then bisection.

    The requests are the same in every run, so that more workers hardly ever look worse than fewer.
    """
    def run(total: int) -> tuple[Fleet, Outcome]:
        fleet = fleet_of(allot(loads, total))
        return fleet, fleet.run(demand.asked).after(WARM_UP)

    few, enough, stride = 0, max(len(loads), math.ceil(sum(loads.values()))), 1
    while not demand.slo.met((best := run(enough))[1]):
        few, enough, stride = enough, enough + stride, 2 * stride
    while few and enough - few > 1:
        middle = (few + enough) // 2
        if demand.slo.met((found := run(middle))[1]):
            enough, best = middle, found
        else:
            few = middle
    return best


def allot(loads: Mapping[str, float], total: int) -> dict[str, int]:
    """Share ``total`` workers out: one each, and every further one to where the slack is smallest in proportion to the root of the load.

    That is the square-root staffing rule, workers = load + k * sqrt(load) with one k for all: small tasks, whose load fluctuates more, get
    more slack (Halfin and Whitt, 1981). Needs at least one worker for each.
    """
    workers = dict.fromkeys(loads, 1)

    def slack(task: str) -> tuple[float, str]:
        return (workers[task] - loads[task]) / math.sqrt(loads[task]) if loads[task] else math.inf, task

    line = [slack(task) for task in loads]
    heapq.heapify(line)
    for _ in range(total - len(loads)):
        task = line[0][1]
        workers[task] += 1
        heapq.heapreplace(line, slack(task))
    return workers
