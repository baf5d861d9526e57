"""`accuracy.json`, `accuracy.md` and `accuracy.png` from the rows' results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from sun_build.evaluate import interval
from sun_build.tune.settings import TuneSettings
from sun_perf.accuracy_plan import ROWS, TASKS, fits
from sun_perf.machine import in_words
from sun_perf.results import write_result

MADE, BY_HAND = "<!-- made by make accuracy from here on -->\n", "<!-- written by hand from here on -->\n"

PAIRS = (
    ("sun_whole", "sun_lora", "SUN (LoRA)"), ("qsun", "sun_lora", "float32 decode"), ("qsun_whole", "sun_whole", "float32 decode"),
    ("qsun_retuned", "sun_lora", "SUN (LoRA)"), ("qsun_further", "sun_lora", "SUN (LoRA)"), ("qsun_whole_further", "sun_whole", "that LoRA in float32"),
    ("qsun_int8", "sun_cut", "float32 decode"), ("qsun_whole_int8", "sun_whole_cut", "float32 decode"))
"""Rows that are held against another than full fine-tuning, and that one in words."""

TRAINED = {"full": "full", "sun_lora": "SUN, LoRA", "sun_all": "SUN, all", "sun_whole": "whole prompts", "qsun_retuned": "QSUN re-tuned",
           "qsun_further": "tuned further", "qsun_whole_further": "whole prompts tuned further"}
"""The trainings, and what their columns are called."""


def load(results: Path) -> dict[str, dict[str, dict]]:
    """{task: {row: result}} of the results there are; those of other settings, which would not compare, are left out."""
    found: dict[str, dict[str, dict]] = {}
    for task in TASKS.values():
        for row in ROWS.values():
            path = results / "accuracy" / f"{task.name}.{row.name}.json"
            if path.is_file() and fits(result := json.loads(path.read_text()), task, row):
                found.setdefault(task.name, {})[row.name] = result
    return found


def write(results: Path, page: Path) -> None:
    """Write the three; of the page only what is between `MADE` and `BY_HAND`, the rest of it stays."""
    found = load(results)
    scores = {task: {row: {key: r[key] for key in ("score", "ci_low", "ci_high", "n")} for row, r in rows.items()} for task, rows in found.items()}
    write_result(results / "accuracy.json", scores)
    draw(found, results / "accuracy.png")
    text = page.read_text() if page.is_file() else ""
    before, _, rest = text.partition(MADE)
    page.write_text(before + MADE + tables(found) + study(results) + BY_HAND + rest.partition(BY_HAND)[2])


def tables(found: dict[str, dict[str, dict]]) -> str:
    """Scores, differences to full fine-tuning, and how each column was trained."""
    tasks = list(found)
    text = table([f"{task} ({TASKS[task].metric})" for task in tasks], {row.title: [cell(found[task].get(row.name)) for task in tasks] for row in ROWS.values()})
    text += "\n![scores](results/accuracy.png)\n\n"
    text += "Points (hundredths) against full fine-tuning on the same test examples, with the paired bootstrap's interval:\n\n"
    pairs = [(name, "full", ROWS[name].title) for name in ROWS if name not in ("base", "full")]
    pairs += [(name, other, f"{ROWS[name].title}, against {title}") for name, other, title in PAIRS]
    text += table(tasks, {title: [against(found[task], name, other) for task in tasks] for name, other, title in pairs})
    text += "\nHow each column was trained: seconds, held-out loss, learning rate.\n\n"
    text += table(["test", "steps x examples", "training examples", *TRAINED.values()], {task: training_cells(task, found[task]) for task in tasks})
    if also := [(task, metric) for task in tasks for metric in TASKS[task].also]:
        scores = {row.title: [found[task][row.name]["also"][metric] if row.name in found[task] else None for task, metric in also] for row in ROWS.values()}
        text += "\nThe same answers by other metrics:\n\n" + table(
            [f"{task} ({metric})" for task, metric in also], {title: ["-" if score is None else f"{score:.3f}" for score in row] for title, row in scores.items()})
    places = sorted({in_words(r["machine"]) for rows in found.values() for r in rows.values()})
    return text + "\nMeasured on: " + "; ".join(places) + ".\n\n"


def table(columns: list[str], rows: dict[str, list[str]]) -> str:
    """A table in Markdown of the rows that have something in a column."""
    text = "| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns) + "\n"
    return text + "".join(f"| {title} | " + " | ".join(cells) + " |\n" for title, cells in rows.items() if set(cells) != {"-"})


def study(results: Path) -> str:
    """The short runs of `sun_perf.accuracy_study`, if there are any."""
    path = results / "accuracy_study.json"
    if not path.is_file():
        return ""
    runs = json.loads(path.read_text())
    text = "## Short runs\n\nOn banking, one seed each (`.venv/bin/python -m sun_perf.accuracy_study --data ../shared/data`):\n\n"
    text += "| run | steps x examples | held-out loss |\n|---|---|---|\n"
    for name, run in sorted(runs.items(), key=lambda one: (one[1]["settings"]["steps"] * one[1]["settings"]["batch"], one[1]["settings"]["steps"], one[1]["held_out_loss"])):
        text += f"| {name} | {run['settings']['steps']} x {run['settings']['batch']} | {run['held_out_loss']:.3f} |\n"
    return text + "\n"


def cell(result: dict | None) -> str:
    """A score with its interval."""
    return "-" if result is None else f"{result['score']:.3f} [{result['ci_low']:.3f}, {result['ci_high']:.3f}]"


def against(rows: dict[str, dict], name: str, other: str) -> str:
    """Difference of two rows in points; the same examples are resampled for both."""
    if name not in rows or other not in rows:
        return "-"
    right = [np.array([int(c) for c in rows[row]["right"]], dtype=float) for row in (name, other)]
    low, high = interval(right[0] - right[1])
    return f"{100 * (right[0] - right[1]).mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def training_cells(task: str, rows: dict[str, dict]) -> list[str]:
    """How a column was trained."""
    trained = {name: rows[name]["trained"] for name in TRAINED if name in rows}
    some = next(iter(trained.values()), None)
    settings = TASKS[task].settings

    def told(name: str) -> str:
        if name not in trained:
            return "-"
        made = TuneSettings(**rows[name]["settings"]["training"])
        return f"{trained[name]['seconds']}, {trained[name]['held_out_loss']}, {made.lr:g}" + (f" ({made.precision})" if made.precision != settings.precision else "")

    return [
        str(next(iter(rows.values()))["n"]), f"{settings.steps} x {settings.batch * settings.accumulate}", str(some["examples"]) if some else "-",
        *map(told, TRAINED)]


def draw(found: dict[str, dict[str, dict]], path: Path) -> None:
    """Bars per task with their intervals."""
    from matplotlib.figure import Figure

    colours = {"base": "#c9c9c9", "full": "#30475e", "naive": "#d98c5f", "sun_lora": "#f2b134", "sun_cut": "#f7cf7a", "sun_all": "#e0902f",
               "sun_whole": "#8e6c8a", "sun_whole_cut": "#bfa5bc", "qsun_whole": "#5b8fb9", "qsun": "#9cc5a1", "qsun_int8": "#6fb39a", "qsun_retuned": "#49a078",
               "qsun_further": "#2f7d5b", "qsun_whole_int8": "#86aed0", "qsun_whole_further": "#2f6690"}
    figure = Figure(figsize=(2.6 + 2.2 * max(1, len(found)), 4.2), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(ROWS)
    for i, row in enumerate(ROWS.values()):
        at = [(x, rows[row.name]) for x, rows in enumerate(found.values()) if row.name in rows]
        if at:
            heights = np.array([r["score"] for _, r in at])
            errors = np.abs(np.array([[r["ci_low"], r["ci_high"]] for _, r in at]).T - heights)
            axes.bar([x + (i - (len(ROWS) - 1) / 2) * width for x, _ in at], heights, width, yerr=errors, label=row.title, color=colours[row.name],
                     error_kw={"linewidth": 0.8, "capsize": 1.5})
    axes.set_xticks(range(len(found)), [f"{task}\n({TASKS[task].metric})" for task in found])
    axes.set(ylabel="share right, greedy", ylim=(0, 1))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=1 if len(found) < 3 else 2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
