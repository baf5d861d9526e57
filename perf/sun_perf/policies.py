"""SUN's shared pool under one policy of its router and another, against conventional disaggregation, at the same load.

`python -m sun_perf.policies` writes perf/results/policies.json: TPOT and TTFT of each, as they took turns, and the ratios to the baseline.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from sun_client.server import Ports, interruptible
from sun_client.show import quiet_libraries, say
from sun_perf.bench import ROOT, SCRATCH, material
from sun_perf.bench_plan import EQUAL_LOAD, Plan
from sun_perf.bench_ratios import BASELINE, ratios
from sun_perf.bench_run import Runner
from sun_perf.fleet_layout import SYSTEMS
from sun_perf.machine import commit, machine
from sun_perf.perf_analyzer import perf_analyzer
from sun_perf.results import RESULTS, write_result

ROUTERS = {"least_tokens": {"policy": "least_tokens"}, **{f"pack_{batch}": {"policy": "pack", "pack_batch": batch} for batch in (4, 8)}}


def measure(runner: Runner, plan: Plan) -> list[dict]:
    """Rows of open loops: the baseline's closed loop gives the rate, then all take turns, A B B A."""
    SYSTEMS.update({name: replace(SYSTEMS["sun"], name=name, router=router) for name, router in ROUTERS.items()})
    for turn in range(plan.rounds + 1):
        for name in [BASELINE] if turn == 0 else plan.systems[::-1 if turn % 2 else 1]:
            with runner.serving(name, plan.tasks) as server:
                for alpha in plan.alphas:
                    runner.open(server, name, plan, turn, alpha, EQUAL_LOAD) if turn else runner.closed(server, name, plan, turn, alpha)
    return [run for run in runner.runs if run["mode"] == "open"]


def medians(rows: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """{system: {alpha: {tpot_p50, tpot_p95, ttft_p50: ms}}}, of the rounds."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, alpha in dict.fromkeys((row["system"], row["alpha"]) for row in rows):
        mine = [row for row in rows if (row["system"], row["alpha"]) == (name, alpha)]
        found.setdefault(name, {})[f"{alpha:g}"] = {
            f"{kind}_{at}": statistics.median(row[f"{kind}_ms"][at] for row in mine) for kind, at in (("tpot", "p50"), ("tpot", "p95"), ("ttft", "p50"))}
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each after the first (default 3)")
    parser.add_argument("--requests", type=int, default=40, help="of an open loop (default 40)")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 1.2, 2.0], help="Zipf exponents of the mix (default 0, 1.2 and 2)")
    parser.add_argument("--port", type=int, default=18200, help="first of three free ports (default 18200)")
    args = parser.parse_args()
    plan = Plan(systems=(BASELINE, *ROUTERS), alphas=tuple(args.alphas), rounds=args.rounds, requests=args.requests)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with interruptible(), quiet_libraries(), tempfile.TemporaryDirectory(dir=SCRATCH) as scratch, perf_analyzer(SCRATCH) as load:
        runner = Runner(Path(scratch), Ports(args.port, args.port + 1, args.port + 2), load, material())
        rows = measure(runner, plan)
    found, to_baseline = medians(rows), ratios(rows, plan)
    write_result(RESULTS / "policies.json", {
        "machine": machine(), "commit": commit(ROOT), "date": time.strftime("%Y-%m-%d"), "load": EQUAL_LOAD, "medians": found, "ratios": to_baseline, "runs": rows})
    for name, alphas in found.items():
        for alpha, figures in alphas.items():
            say(f"{name}, alpha {alpha}: " + ", ".join(f"{key} {value:g} ms" for key, value in figures.items())
                + "".join(f", {key} over conventional {ratio['median']:.3f}" for key, ratio in to_baseline.get(name, {}).get(alpha, {}).items()))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
