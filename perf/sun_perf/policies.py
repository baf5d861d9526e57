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
from sun_perf.bench_ratios import BASELINE
from sun_perf.bench_run import Runner
from sun_perf.fleet_layout import SYSTEMS
from sun_perf.machine import commit, machine
from sun_perf.perf_analyzer import perf_analyzer
from sun_perf.results import RESULTS, write_result

ROUTERS = {"least_tokens": {"policy": "least_tokens"}, **{f"pack_{batch}": {"policy": "pack", "pack_batch": batch} for batch in (4, 8, 16)}}


def measure(runner: Runner, plan: Plan) -> list[dict]:
    """Rows of open loops: the baseline's closed loop gives the rate, then all take turns, A B B A."""
    SYSTEMS.update({name: replace(SYSTEMS["sun"], name=name, router=router) for name, router in ROUTERS.items()})
    names = [BASELINE, *ROUTERS]
    for turn in range(plan.rounds + 1):
        for name in [BASELINE] if turn == 0 else names[::-1 if turn % 2 else 1]:
            with runner.serving(name, plan.tasks) as server:
                for alpha in plan.alphas:
                    runner.open(server, name, plan, turn, alpha, EQUAL_LOAD) if turn else runner.closed(server, name, plan, turn, alpha)
    return [run for run in runner.runs if run["mode"] == "open"]


def summary(rows: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """{alpha: {system: {tpot_p50, tpot_p95, ttft_p50: ms, and tpot_p50_ratio, tpot_p95_ratio: to the baseline's}}}, medians of the rounds."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for alpha in sorted({row["alpha"] for row in rows}):
        mine = found[f"{alpha:g}"] = {}
        for name in dict.fromkeys(row["system"] for row in rows):
            mine[name] = {f"{kind}_{at}": statistics.median(row[f"{kind}_ms"][at] for row in rows if (row["system"], row["alpha"]) == (name, alpha))
                          for kind, at in (("tpot", "p50"), ("tpot", "p95"), ("ttft", "p50"))}
        for name, at in ((name, at) for name in mine for at in ("p50", "p95")):
            pairs = zip(*([row["tpot_ms"][at] for row in sorted(rows, key=lambda row: row["round"]) if (row["system"], row["alpha"]) == (who, alpha)]
                          for who in (name, BASELINE)), strict=True)
            mine[name][f"tpot_{at}_ratio"] = round(statistics.median(own / base for own, base in pairs), 3)
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each after the first (default 3)")
    parser.add_argument("--requests", type=int, default=40, help="of an open loop (default 40)")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 1.2, 2.0], help="Zipf exponents of the mix (default 0, 1.2 and 2)")
    parser.add_argument("--port", type=int, default=18200, help="first of three free ports (default 18200)")
    args = parser.parse_args()
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with interruptible(), quiet_libraries(), tempfile.TemporaryDirectory(dir=SCRATCH) as scratch, perf_analyzer(SCRATCH) as load:
        runner = Runner(Path(scratch), Ports(args.port, args.port + 1, args.port + 2), load, material())
        rows = measure(runner, Plan(alphas=tuple(args.alphas), rounds=args.rounds, requests=args.requests))
    found = summary(rows)
    write_result(RESULTS / "policies.json", {
        "machine": machine(), "commit": commit(ROOT), "date": time.strftime("%Y-%m-%d"), "load": EQUAL_LOAD, "summary": found, "runs": rows})
    for alpha, systems in found.items():
        for name, figures in systems.items():
            say(f"alpha {alpha}, {name}: " + ", ".join(f"{key} {value:g}" for key, value in figures.items()))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
