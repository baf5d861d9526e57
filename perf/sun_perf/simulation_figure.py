"""SUN against partitioned decode workers as tasks grow in number: `python -m sun_perf.simulation_figure` writes perf/results/growth.json and growth.png.

Decode alone: prefill is the same in both, so no prompt waits for it here. Every point is a search for the fewest decode workers that meet the SLO.
Beside them, what a token costs by context and by concurrency, as the calibration measured it.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from sun_perf.results import RESULTS, write_result
from sun_perf.simulation.calibration import Calibration
from sun_perf.simulation.fleet import Limits
from sun_perf.simulation.outcome import Slo
from sun_perf.simulation.plan import Demand, plan
from sun_perf.simulation.traffic import Lognormal, Traffic, named
from sun_perf.workload import zipf

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

ALPHAS = (0.0, 0.8, 1.2, 2.0)
TASKS = (2, 4, 8, 16, 32, 64, 128, 256)
RATE_PER_TASK = 0.5
RATES = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
TASKS_BY_RATE = 32
LENGTHS = (Lognormal("prompt", 150, 350), Lognormal("output", 48, 110))
MAX_TOKENS = 128
COLOURS = {"sun": "#e0902f", "partitioned": "#30475e"}
SHADES = ("#c5ddc8", "#9cc5a1", "#49a078", "#216869", "#1f2421")
"""Of lines in order; fewer lines have the last of them."""


def point(calibration: Path, tasks: int, alpha: float, rate_per_task: float, slo: Slo, scheme: str) -> dict[str, float]:
    """Decode workers and throughput of both, for ``rate_per_task`` requests a second and task on average."""
    measured = Calibration.load(calibration)
    traffic = Traffic(rate_per_task * tasks, named(zipf(tasks, alpha)), LENGTHS, MAX_TOKENS)
    demand = Demand(traffic, slo, measured.step_time(scheme, 1), measured.prefill_time(1), Limits(token_budget=measured.token_budget))
    made = {"tasks": tasks, "alpha": alpha, "rate_per_task": rate_per_task}
    for name, partitioned in (("sun", False), ("partitioned", True)):
        numbers = plan(demand, partitioned, prefill=False).numbers()
        made |= {f"{name}_workers": numbers["decode_workers"], f"{name}_tpot_p95_ms": round(numbers["tpot_p95_ms"], 1),
                 f"{name}_requests_per_s_per_worker": round(traffic.rate / numbers["decode_workers"], 4)}
    return made


def token_costs(measured: Calibration, scheme: str) -> list[dict[str, float]]:
    """ms of a worker for one token, by sequences in the step and by their context: a step's time over its sequences."""
    return [{"batch": row.batch, "context": row.context, "ms_per_token": round(row.ms / row.batch, 3)}
            for row in measured.steps if (row.scheme, row.threads) == (scheme, 1)]


def figure_of(growth: dict) -> Figure:
    """`growth.json` drawn.

    Above: throughput a worker by number of tasks, a panel per skew. Middle: how many times the workers partitioning needs. Below: what a token costs.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 10.8), layout="constrained")
    upper, middle, lower = figure.subfigures(3, 1)
    draw_points(growth["points"], upper, middle)
    draw_costs(growth["token_costs"], lower)
    return figure


def draw_costs(costs: list[dict[str, float]], figure: SubFigure) -> None:
    """Left by context, a line for each number of sequences; right the other way round."""
    names = {"context": "tokens of context", "batch": "sequences in the step"}
    for axes, (key, other) in zip(figure.subplots(1, 2, sharey=True), (("context", "batch"), ("batch", "context")), strict=True):
        lines = sorted({cost[other] for cost in costs})
        for shade, at in zip(SHADES[-len(lines):], lines, strict=True):
            line = sorted((cost[key], cost["ms_per_token"]) for cost in costs if cost[other] == at)
            axes.plot(*zip(*line, strict=True), "o-", ms=4, color=shade, label=f"{at:g}")
        by_twos(axes, tuple(sorted({cost[key] for cost in costs})))
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(xlabel=names[key], ylabel="ms of a worker a token,\nmeasured")
        axes.legend(frameon=False, fontsize=8, ncols=len(lines), loc="upper right", title=names[other], title_fontsize=8)
    axes.set_ylim(top=3 * max(cost["ms_per_token"] for cost in costs))  # of both: room for the legends


def draw_points(points: list[dict[str, float]], upper: SubFigure, lower: SubFigure) -> None:
    """The simulated points: throughput a worker above, workers needed below."""
    by_tasks = [p for p in points if p["rate_per_task"] == RATE_PER_TASK]
    panels = upper.subplots(1, len(ALPHAS), sharey=True)
    for axes, alpha in zip(panels, ALPHAS, strict=True):
        mine = [p for p in by_tasks if p["alpha"] == alpha]
        for name, label in (("sun", "SUN: one pool"), ("partitioned", "partitioned: workers of their own")):
            axes.plot([p["tasks"] for p in mine], [p[f"{name}_requests_per_s_per_worker"] for p in mine], "o-", ms=4, color=COLOURS[name], label=label)
        axes.set(title="uniform mix" if alpha == 0 else f"Zipf, alpha {alpha:g}", xlabel="tasks")
        by_twos(axes, TASKS)
    panels[0].set_ylim(bottom=0)  # once, at the end: a limit set for one panel keeps those that share it from growing with their lines
    panels[0].set_ylabel("requests/s a decode worker,\nSLO met")
    upper.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    left, right = lower.subplots(1, 2)
    for shade, alpha in zip(SHADES[-len(ALPHAS):], ALPHAS, strict=True):
        for axes, key, at in ((left, "tasks", by_tasks), (right, "rate_per_task", [p for p in points if p["tasks"] == TASKS_BY_RATE])):
            mine = [p for p in at if p["alpha"] == alpha]
            axes.plot([p[key] for p in mine], [p["partitioned_workers"] / p["sun_workers"] for p in mine], "o-", ms=4, color=shade, label=f"alpha {alpha:g}")
    left.set(xlabel=f"tasks, {RATE_PER_TASK:g} requests/s each on average", ylabel="decode workers needed,\npartitioned over SUN")
    right.set(xlabel=f"requests/s of a task on average, {TASKS_BY_RATE} tasks", ylabel="decode workers needed,\npartitioned over SUN")
    by_twos(left, TASKS)
    by_twos(right, RATES)
    for axes in (left, right):
        axes.axhline(1, color="#999999", lw=0.8, ls="--")
        axes.set_ylim(0, None)
        axes.legend(frameon=False, fontsize=8)


def by_twos(axes, values: tuple[float, ...]) -> None:
    """A logarithmic axis with its values written out."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.grid(alpha=0.3)


def main() -> None:
    """Simulate what is to be drawn, or with --draw only draw again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, default=RESULTS / "calibration.json")
    parser.add_argument("--scheme", default="fp32")
    parser.add_argument("--ttft-ms", type=float, default=2000)
    parser.add_argument("--tpot-ms", type=float, default=150)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--draw", action="store_true", help="from growth.json as it is")
    args = parser.parse_args()
    path = RESULTS / "growth.json"
    if not args.draw:
        wanted = sorted({*product(TASKS, ALPHAS, [RATE_PER_TASK]), *product([TASKS_BY_RATE], ALPHAS, RATES)})
        with ProcessPoolExecutor(args.jobs) as pool:
            made = [pool.submit(point, args.calibration, *at, Slo(args.ttft_ms, args.tpot_ms), args.scheme) for at in reversed(wanted)]
            points = [future.result() for future in reversed(made)]
        measured = Calibration.load(args.calibration)
        write_result(path, {
            "machine": measured.machine, "commit": measured.commit, "scheme": args.scheme, "slo": {"ttft_p95_ms": args.ttft_ms, "tpot_p95_ms": args.tpot_ms},
            "points": points, "token_costs": token_costs(measured, args.scheme)})
    figure_of(json.loads(path.read_text())).savefig(path.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
