"""One real run against its simulation: `python -m sun_perf.validate_simulation` writes perf/results/simulation_validation.json.

Engines and router run in this process. The machine is measured before and after, and the simulation is fitted to both together, since
on a shared machine step times drift.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sun_perf.results import RESULTS, write_result

if TYPE_CHECKING:
    from sun.local import LocalFleet
    from sun.router.router import Router
    from sun_perf.simulation.costs import StepTime
    from sun_perf.simulation.outcome import Outcome
    from sun_perf.simulation.traffic import Request

PATH = RESULTS / "simulation_validation.json"
BATCHES, CONTEXTS, PROMPTS = (1, 2, 4, 8), (48, 96, 192), (24, 64, 128, 256)
MAX_BATCH, KV_TOKENS, TOKEN_BUDGET = 8, 8192, 512
PATIENCE_S = 300.0
COMPARED = ("tokens_per_s", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms", "tpot_p95_ms", "mean_batch")


class Timed:
    """A router's client that notes when tokens come, in seconds of ``time.perf_counter``."""

    def __init__(self) -> None:
        self.asked, self.first, self.last = time.perf_counter(), 0.0, 0.0
        self.tokens = 0
        self.error: Exception | None = None
        self.done = threading.Event()

    def send(self, piece) -> None:
        """See `sun.router.active.Client.send`."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.tokens += len(piece.token_ids)
        if piece.finish_reason:
            self.done.set()

    def fail(self, error) -> None:
        """See `sun.router.active.Client.fail`."""
        self.error = error
        self.done.set()

    def cancelled(self) -> bool:
        """Never."""
        return False


def real(router: Router, fleet: LocalFleet, requests: list[Request], texts: list[str]) -> Outcome:
    """Send the requests at their times, each for exactly its output tokens, and note what came back."""
    import numpy as np

    from sun.router.request import GenerateRequest
    from sun_perf.simulation.outcome import Outcome

    before = {name: engine.stats().step for name, engine in fleet.decodes.items()}
    started, clients = time.perf_counter(), []
    for request, text in zip(requests, texts, strict=True):
        time.sleep(max(0.0, started + request.at - time.perf_counter()))
        clients.append(Timed())
        router.submit(GenerateRequest(
            messages=[{"role": "user", "content": text}], task=request.task, stream=True, returns=frozenset({"token_ids"}),
            sampling={"temperature": 0, "max_tokens": request.output, "ignore_eos": True}), clients[-1])
    for client in clients:
        if not client.done.wait(PATIENCE_S):
            raise RuntimeError(f"a request did not end within {PATIENCE_S:g} s of the last arrival")
        if client.error:
            raise client.error
    batches: dict[int, int] = {}
    busy = []
    for name, engine in fleet.decodes.items():
        records = engine.stats(before[name]).steps
        busy.append(sum(record.ms for record in records))
        for record in records:
            batches[sum(record.tasks.values())] = batches.get(sum(record.tasks.values()), 0) + 1
    asked, first, last = (1e3 * (np.array([getattr(c, name) for c in clients]) - started) for name in ("asked", "first", "last"))
    return Outcome(
        asked, first, last, np.array([c.tokens for c in clients]), np.array(busy) / (last.max() - asked.min()), np.zeros(0), dict(sorted(batches.items())))


def compare(measured: Outcome, simulated: Outcome) -> dict[str, dict[str, float]]:
    """Each number of both, and the simulation's relative error."""
    ours, theirs = simulated.summary(), measured.summary()
    return {name: {"measured": round(theirs[name], 3), "simulated": round(ours[name], 3), "error": round(ours[name] / theirs[name] - 1, 4)} for name in COMPARED}


def slower(measured: Outcome, steps: StepTime, requests: list[Request]) -> float:
    """How many times as long the run's steps took as the fit says for their batches, at the requests' mean context.

    Other load on the machine makes it differ from 1; what error is left at that speed is the simulation's own.
    """
    context = sum(r.output * (r.prompt + r.output / 2) for r in requests) / sum(r.output for r in requests)
    fitted = sum(count * steps.ms(batch, context) for batch, count in measured.batches.items())
    return float(measured.decode_busy.sum()) * 1e3 * measured.seconds / fitted


def main() -> None:
    """Measure, run, simulate, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=75, help="of arrivals")
    parser.add_argument("--rate", type=float, default=0.6, help="requests a second")
    parser.add_argument("--workers", type=int, default=1, help="decode workers; with the prefill modules they should not need more cores than there are")
    parser.add_argument("--alpha", type=float, default=0.8, help="of the tasks' Zipf shares")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it once, when it is imported

    from sun.local import LocalFleet
    from sun.model.manifest import BaseManifest
    from sun.router.policy import LeastTokens
    from sun.router.router import Router
    from sun.router.tasks import TaskRegistry
    from sun.text.prompt import PromptFormat
    from sun_client.root import Root
    from sun_perf.calibrate import AS_IT_IS, measure_prefill, measure_steps
    from sun_perf.machine import commit, machine
    from sun_perf.simulation.costs import PrefillTime, StepTime
    from sun_perf.simulation.fleet import Fleet, Limits
    from sun_perf.simulation.traffic import Lognormal, Request, Traffic
    from sun_perf.workload import zipf

    root = Root.find()
    registry, prompts = TaskRegistry(root.models), PromptFormat.load(root.base, BaseManifest.load(root.base).prompt)
    tasks = registry.names()
    if not tasks:
        raise SystemExit(f"{root.models}: there is no task; `sun setup` adds the shipped ones")
    lengths = (Lognormal("prompt", 40, 90), Lognormal("output", 24, 56))
    drawn = Traffic(args.rate, dict(zip(tasks, zipf(len(tasks), args.alpha), strict=True)), lengths, 96).requests(round(args.rate * args.seconds), args.seed)
    texts = ["time " * request.prompt for request in drawn]
    requests = [
        Request(r.task, r.at, len(prompts.encode([{"role": "user", "content": text}])), r.output, r.output) for r, text in zip(drawn, texts, strict=True)]
    fleet = LocalFleet(root.base, {task: root.models / f"prefill_{task}" / "1" for task in tasks}, args.workers, KV_TOKENS,
                       token_budget=TOKEN_BUDGET, max_batch=MAX_BATCH)
    router = Router(fleet, list(fleet.decodes), registry, prompts, LeastTokens(), [])

    def times() -> tuple[list, list]:
        return measure_steps(fleet, "fp32", 1, AS_IT_IS, BATCHES, CONTEXTS), measure_prefill(fleet, 1, AS_IT_IS, PROMPTS)

    try:
        before = times()
        measured = real(router, fleet, requests, texts)
        after = times()
    finally:
        router.close()
        fleet.close()
    steps, prefills = StepTime.from_rows(before[0] + after[0]), PrefillTime.from_rows(before[1] + after[1], TOKEN_BUDGET)
    slowed = slower(measured, steps, requests)

    def simulated(factor: float) -> Outcome:
        limits = Limits(MAX_BATCH, KV_TOKENS, TOKEN_BUDGET)
        return Fleet(steps.scaled(factor), prefills.scaled(factor), limits, args.workers, dict.fromkeys(tasks, 1)).run(requests)

    result = {
        "machine": machine(), "commit": commit(root.path), "settings": {k: v for k, v in vars(args).items() if k != "out"}, "requests": len(requests),
        "fit_error_median": {"steps": round(steps.fit.median, 4), "prefill": round(prefills.fit.median, 4)},
        "step_ms_after_over_before": round(StepTime.from_rows(after[0]).ms(4, 96) / StepTime.from_rows(before[0]).ms(4, 96), 3),
        "compared": compare(measured, simulated(1.0)),
        "step_ms_in_the_run_over_calibrated": round(slowed, 3), "compared_at_the_run's_speed": compare(measured, simulated(slowed))}
    write_result(args.out, result)
    for title, key in (("as calibrated", "compared"), (f"at the run's speed, steps {slowed:.2f} times as long", "compared_at_the_run's_speed")):
        print(title)
        for name, row in result[key].items():
            print(f"  {name:14} measured {row['measured']:9.2f}, simulated {row['simulated']:9.2f}, error {row['error']:+.1%}")
    print(args.out)


if __name__ == "__main__":
    main()
