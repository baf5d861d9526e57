"""Figures of `bench.json` and `steps.json`, one per claim. `python -m sun_perf.figures` draws them anew."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sun_perf.bench_plan import EQUAL_LOAD
from sun_perf.machine import processor
from sun_perf.results import RESULTS

LOOKS = {"partitioned": ("#30475e", "o", "-"), "sun": ("#f2b134", "s", "-"), "sun_all": ("#d98c5f", "D", ":"), "qsun": ("#49a078", "^", "-")}
"""Colour, marker and line of each system."""
QSUN_AIM, FLOOR_AIM = 1.45, 1.5
"""What QSUN over SUN was to reach at least, and a step over the machine's floor at most."""


def draw(results: Path) -> list[Path]:
    """Draw the figures of the results that there are, beside them; their files. One that they have nothing for goes, since it would be of an older run."""
    sources = {
        "bench.json": {"throughput_per_worker": throughput_per_worker, "tpot": tpot, "goodput": goodput, "memory": memory}, "steps.json": {"steps": steps}}
    drawn = []
    for source, makers in sources.items():
        if not (results / source).is_file():
            continue
        found = json.loads((results / source).read_text())
        for name, make in makers.items():
            figure, path = make(found), results / f"{name}.png"
            if figure is None:
                path.unlink(missing_ok=True)
            else:
                figure.savefig(path, dpi=130)
                drawn.append(path)
    return drawn


def throughput_per_worker(bench: dict) -> Figure:
    """Bars: tokens a second and worker at saturation, by task mix, and how many times the baseline's that is."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    runs = [run for run in _main(bench) if run["mode"] == "closed"]
    tops = _bars(bench, axes, runs, lambda run: run["tokens_per_s"] / run["workers"])
    for (system, alpha), (x, top) in tops.items():
        found = bench["ratios"].get(system, {}).get(f"{alpha:g}")
        if found:
            axes.annotate(f"{found['throughput_per_worker']['median']:.2f}x", (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.set(ylabel="tokens/s per decode worker")
    axes.margins(y=0.12)
    return _finish(bench, figure, axes, "Throughput per decode worker at saturation")


def tpot(bench: dict) -> Figure:
    """Bars: TPOT's median by task mix at an equal load that all sustain; dashes: its 95th percentile."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    runs = [run for run in _main(bench) if run.get("load") == EQUAL_LOAD]
    places = _bars(bench, axes, runs, lambda run: run["tpot_ms"]["p50"])
    for (system, alpha), (x, _) in places.items():
        p95 = statistics.median(run["tpot_ms"]["p95"] for run in runs if (run["system"], run["alpha"]) == (system, alpha))
        axes.plot(x, p95, "_", color="black", markersize=14, label="95th percentile" if (system, alpha) == next(iter(places)) else None)
    axes.set(ylabel="TPOT, ms (bars: median)")
    return _finish(bench, figure, axes, f"Time per output token at {EQUAL_LOAD:.0%} of what all systems sustain")


def goodput(bench: dict) -> Figure | None:
    """Lines: requests a second within the SLO against those offered, a panel for each task mix. None if a mix had one load, as in the quick bench: no line."""
    runs = [run for run in _main(bench) if run["mode"] == "open"]
    if len({run["load"] for run in runs}) < 2:
        return None
    alphas = _alphas(runs)
    columns = min(2, len(alphas))
    rows = -(-len(alphas) // columns)
    figure = Figure(figsize=(7 if columns > 1 else 5, 0.9 + 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(alphas):]:
        axes.remove()
    for axes, alpha in zip(panels.flat, alphas, strict=False):
        most = max(run["requests_per_s"] for run in runs if run["alpha"] == alpha)
        axes.plot([0, most], [0, most], color="grey", linewidth=0.8, linestyle="--", label="every request within")
        for system in _systems(runs):
            mine = [run for run in runs if (run["system"], run["alpha"]) == (system, alpha)]
            points = sorted((rate, statistics.median(run["goodput_per_s"] for run in mine if run["requests_per_s"] == rate)) for rate in {run["requests_per_s"] for run in mine})
            _line(bench, axes, system, *zip(*points, strict=True))
        axes.set(xlabel="offered requests/s", xlim=(0, None))
        axes.set_title(f"Zipf alpha {alpha:g}" + (" (uniform)" if alpha == 0 else ""), fontsize=10)
        axes.grid(alpha=0.3)
    # Once, at the end: a limit set for one panel keeps those that share it from growing with their lines.
    panels[0, 0].set_ylim(bottom=0)
    for axes in panels[:, 0]:
        axes.set_ylabel("requests/s within the SLO")
    slo = bench["settings"]["slo"]
    figure.suptitle(f"Goodput: TTFT within {slo['ttft_ms']:g} ms and TPOT within {slo['tpot_ms']:g} ms\n{_where(bench)}", fontsize=11)
    _legend(figure, panels[0, 0])
    return figure


def memory(bench: dict) -> Figure:
    """Lines: memory of all of a server's processes against the number of tasks."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for system in _systems(bench["memory"]):
        points = sorted((row["tasks"], row["pss_mib"]["total"] / 1024) for row in bench["memory"] if row["system"] == system)
        _line(bench, axes, system, *zip(*points, strict=True))
    axes.set(xlabel="tasks", ylabel="memory of all processes, GiB (PSS)", ylim=(0, None), xticks=sorted({row["tasks"] for row in bench["memory"]}))
    axes.grid(alpha=0.3)
    axes.set_title("Memory of the whole server by number of tasks", fontsize=11)
    _legend(figure, axes)
    return figure


def steps(found: dict) -> Figure | None:
    """Bars by batch, from `steps.json`: how many times as fast as SUN's step QSUN's is, and how long both take over the machine's floor; lines: the aims.

    None where no low-bit format was timed.
    """
    low, over_floor, threads = found["qsun_scheme"], found["step_over_floor"], found["limits"]["threads"]
    if low is None:
        return None
    sun, qsun = LOOKS["sun"][0], LOOKS["qsun"][0]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _by_batch(left, {f"QSUN ({low}) over SUN (fp32)": (qsun, found["qsun_over_sun"])}, QSUN_AIM, f"aim: at least {QSUN_AIM}")
    _by_batch(right, {"SUN (fp32)": (sun, over_floor["fp32"]), f"QSUN ({low})": (qsun, over_floor[low])}, FLOOR_AIM, f"aim: at most {FLOOR_AIM}")
    left.set(ylabel="times as many steps a second")
    right.set(ylabel="times the machine's floor")
    where = f"{threads} CPU thread{'s' * (threads > 1)}, {found['context']} tokens a sequence, {processor(found['machine'])}"
    figure.suptitle(f"A decode step of one worker: {where}", fontsize=11)
    return figure


def _by_batch(axes: Axes, bars: dict[str, tuple[str, dict[str, float]]], aim: float, title: str) -> None:
    """Bars by batch in each label's colour, with their values, and a line at what was aimed at."""
    width = 0.8 / len(bars)
    for i, (label, (colour, values)) in enumerate(bars.items()):
        places = [group + (i - (len(bars) - 1) / 2) * width for group in range(len(values))]
        axes.bar_label(axes.bar(places, list(values.values()), 0.92 * width, color=colour, label=label), fmt="%.2f", fontsize=8, padding=2)
        axes.set_xticks(range(len(values)), list(values))
    axes.axhline(aim, color="black", linewidth=0.9, linestyle="--", label=title)
    axes.set_xlabel("sequences in the step")
    axes.margins(y=0.3)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)


def _main(bench: dict) -> list[dict]:
    """Runs of the plan that the claims are made of."""
    return [run for run in bench["runs"] if run["tasks"] == bench["settings"]["plans"][0]["tasks"]]


def _systems(rows: Sequence[dict]) -> list[str]:
    return [system for system in LOOKS if any(row["system"] == system for row in rows)]


def _alphas(runs: Sequence[dict]) -> list[float]:
    return sorted({run["alpha"] for run in runs})


def _bars(bench: dict, axes: Axes, runs: Sequence[dict], value: Callable[[dict], float]) -> dict[tuple[str, float], tuple[float, float]]:
    """Draw groups of bars by alpha, a bar per system: medians, whiskers from lowest to highest. Returns each bar's place and top."""
    systems, alphas = _systems(runs), _alphas(runs)
    width, places = 0.8 / len(systems), {}
    for i, system in enumerate(systems):
        for group, alpha in enumerate(alphas):
            values = [value(run) for run in runs if (run["system"], run["alpha"]) == (system, alpha)]
            x, middle = group + (i - (len(systems) - 1) / 2) * width, statistics.median(values)
            axes.bar(x, middle, 0.92 * width, yerr=[[middle - min(values)], [max(values) - middle]], color=LOOKS[system][0],
                     label=_title(bench, system) if group == 0 else None, error_kw={"linewidth": 0.8, "capsize": 2})
            places[system, alpha] = x, max(values)
    axes.set_xticks(range(len(alphas)), [f"alpha {alpha:g}" + (" (uniform)" if alpha == 0 else "") for alpha in alphas])
    axes.set_xlabel("task mix: Zipf")
    return places


def _line(bench: dict, axes: Axes, system: str, x: Sequence[float], y: Sequence[float]) -> None:
    colour, marker, style = LOOKS[system]
    axes.plot(x, y, color=colour, marker=marker, linestyle=style, markersize=5, label=_title(bench, system))


def _finish(bench: dict, figure: Figure, axes: Axes, title: str) -> Figure:
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_title(f"{title}\n{_where(bench)}", fontsize=11)
    _legend(figure, axes)
    return figure


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def _where(bench: dict) -> str:
    return f"{bench['settings']['plans'][0]['tasks']} tasks, {bench['machine']['cpus']} CPUs"


def _title(bench: dict, system: str) -> str:
    return bench["settings"]["systems"][system]


if __name__ == "__main__":
    for path in draw(RESULTS):
        print(path)
