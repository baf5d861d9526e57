"""Runs a plan: every system in turn, round after round, each on a server of its own that has the machine to itself."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sun_client.client import SunClient
from sun_client.server import Ports, Server
from sun_client.show import say
from sun_perf.bench_plan import Plan
from sun_perf.fleet_layout import SYSTEMS, Material, lay_out, task_names
from sun_perf.load import Load, OwnLoad, check
from sun_perf.memory import pss_mb
from sun_perf.other_load import watch
from sun_perf.running import running, url
from sun_perf.samples import Sample, Slo, latencies, saturated_rate
from sun_perf.workload import Request, draw, poisson

SEED = 20260
CHECKED_SYSTEM = "sun"
CHECKED_CONCURRENCIES = (4, 16)


@dataclass
class Runner:
    """What all runs share, and their results so far. scratch: an empty folder for repositories and weights.

    memory: (system, tasks) -> PSS in MiB by role. agreement: what both load generators saw, by concurrency.
    """

    scratch: Path
    ports: Ports
    load: Load
    material: Material
    slo: Slo = Slo()
    runs: list[dict] = field(default_factory=list)
    memory: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)
    agreement: list[dict] = field(default_factory=list)
    _roots: dict[tuple[str, int], Path] = field(default_factory=dict)

    def compare(self, plan: Plan) -> None:
        """Run a plan: systems in the order A B B A A B, so that a drift of the machine hits all alike, and B's turns on one server.

        The first round finds what each system sustains; the rates of the others' open loops follow from it.
        """
        turns = [(turn, name) for turn in range(plan.rounds + 1) for name in plan.systems[::-1 if turn % 2 else 1]]
        for name, group in itertools.groupby(turns, key=lambda turn: turn[1]):
            with self.serving(name, plan.tasks) as server:
                for turn, _ in group:
                    for alpha in plan.alphas:
                        self.closed(server, name, plan, turn, alpha)
                        for load in plan.loads if turn else ():
                            self.open(server, name, plan, turn, alpha, load)
                if name == CHECKED_SYSTEM and not self.agreement:
                    self._check_load(server, plan)

    @contextmanager
    def serving(self, name: str, tasks: int) -> Iterator[Server]:
        """A server of a system, with every task asked once so that all its weights are in memory, whose use is noted then."""
        key = (name, tasks)
        if key not in self._roots:
            self._roots[key] = lay_out(self.scratch / f"{name}-{tasks}", self.scratch / "full", self.material, SYSTEMS[name], tasks)
        with running(self._roots[key], self.ports) as server:
            with SunClient(url(server)) as client:
                for task in task_names(tasks):
                    client.generate(task, "warm up", sampling={"temperature": 0, "max_tokens": 4, "ignore_eos": True})
            if key not in self.memory:
                self.memory[key] = pss_mb(server.pid)
                say(f"{name}, {tasks} tasks: {self.memory[key]['total']:.0f} MiB")
            yield server

    def measure_memory(self, name: str, tasks: int) -> None:
        """Note a system's memory unless it has served this many tasks already."""
        if (name, tasks) not in self.memory:
            with self.serving(name, tasks):
                pass

    def _check_load(self, server: Server, plan: Plan) -> None:
        """The same closed loops by the run's load generator and by our own client, in turn: do both see the same?"""
        for concurrency in CHECKED_CONCURRENCIES:
            requests = self._requests(plan, plan.alphas[-1], concurrency)[:2 * concurrency + 8]
            seen = {load.name: self._figures(self._asked(load, server, requests, concurrency), concurrency) for load in (self.load, OwnLoad())}
            ours, theirs = seen[OwnLoad.name]["tokens_per_s"], seen[self.load.name]["tokens_per_s"]
            self.agreement.append({"concurrency": concurrency, **seen, "throughput_ratio": round(ours / theirs, 3)})
            say(f"concurrency {concurrency}: " + ", ".join(f"{name} {figures['tokens_per_s']:.1f} tokens/s" for name, figures in seen.items()))

    def closed(self, server: Server, name: str, plan: Plan, turn: int, alpha: float) -> None:
        """A closed loop of a plan on a system's server, noted in ``runs``. Turn 0 says what the system sustains."""
        requests, others = self._requests(plan, alpha, turn), watch(server.pid)
        figures = self._figures(self._asked(self.load, server, requests, plan.concurrency), plan.concurrency)
        self._note(name, plan, turn, alpha, {"mode": "closed", "concurrency": plan.concurrency, **figures, "other_cpus": others()})

    def open(self, server: Server, name: str, plan: Plan, turn: int, alpha: float, load: float) -> None:
        """An open loop, likewise, at a share ``load`` of the request rate that the slowest system of turn 0 sustained."""
        requests, others = self._requests(plan, alpha, turn), watch(server.pid)
        rate = load * self._sustained(plan, alpha)
        samples = self.load.open(url(server), requests, poisson(len(requests), rate, SEED + turn))
        check(samples, requests)
        seen = latencies(samples, self.slo)
        self._note(name, plan, turn, alpha, {
            "mode": "open", "load": load, "requests_per_s": round(rate, 4), **seen, "goodput_per_s": round(rate * seen["slo_share"], 4), "other_cpus": others()})

    def _note(self, name: str, plan: Plan, turn: int, alpha: float, figures: dict) -> None:
        workers = SYSTEMS[name].workers(plan.tasks)
        self.runs.append({"round": turn, "system": name, "tasks": plan.tasks, "workers": workers, "alpha": alpha, **figures})
        loop = f"{figures['tokens_per_s']:.1f} tokens/s" if figures["mode"] == "closed" else (
            f"{figures['requests_per_s']:.2f} requests/s, {figures['slo_share']:.0%} within the SLO")
        say(f"round {turn} of {plan.rounds}, {name}, {plan.tasks} tasks on {workers} workers, alpha {alpha:g}, {figures['mode']} loop: {loop}, "
            f"TTFT {figures['ttft_ms']['p50']:.0f} ms, TPOT {figures['tpot_ms']['p50']:.0f} ms (others used {figures['other_cpus']:g} CPUs)")

    def _asked(self, load: Load, server: Server, requests: list[Request], concurrency: int) -> list[Sample]:
        samples = load.closed(url(server), requests, concurrency)
        check(samples, requests)
        return samples

    def _figures(self, samples: list[Sample], concurrency: int) -> dict:
        return {"tokens_per_s": round(saturated_rate(samples, concurrency), 3), **latencies(samples, self.slo)}

    def _sustained(self, plan: Plan, alpha: float) -> float:
        """Requests a second that the slowest system sustained in the first round."""
        tokens = statistics.mean(request.tokens for request in self._requests(plan, alpha, 0))
        first = [run for run in self.runs if (run["round"], run["tasks"], run["alpha"]) == (0, plan.tasks, alpha)]
        return min(run["tokens_per_s"] for run in first) / tokens

    @staticmethod
    def _requests(plan: Plan, alpha: float, turn: int) -> list[Request]:
        """The same for every system; each round draws others."""
        return draw(task_names(plan.tasks), alpha, plan.requests, SEED + turn, plan.prompt, plan.output)
