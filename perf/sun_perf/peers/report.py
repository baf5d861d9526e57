"""`peers.json` and its figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sun_perf.peers.plan import VARIANTS, Variant
from sun_perf.peers.wave import Wave, ratio, summary
from sun_perf.results import write_result

AT = 8
"""Concurrency of `over_peer`."""


def rows(variant: Variant, waves: dict[int, tuple[list[Wave], list[Wave]]]) -> list[dict]:
    """Two rows a concurrency, ours and the peer's. The peer's has the ratio: our tokens/s over its."""
    made = []
    for concurrency, (ours, theirs) in waves.items():
        common = {"variant": variant.name, "concurrency": concurrency}
        made.append({**common, "system": "sun", "scheme": variant.scheme, **summary(ours)})
        made.append({
            **common, "system": variant.peer, "reference": variant.reference, **summary(theirs), "sun_over_it": ratio(ours, theirs)})
    return made


def over_peer(found: Sequence[dict]) -> dict[str, float]:
    """Peer -> the lowest ratio at `AT` requests over all the ways in which it serves several tasks."""
    lowest: dict[str, float] = {}
    for row in found:
        if row["system"] != "sun" and not row["reference"] and row["concurrency"] == AT:
            lowest[row["system"]] = min(row["sun_over_it"], lowest.get(row["system"], row["sun_over_it"]))
    return lowest


def table(found: Sequence[dict]) -> str:
    """Markdown: tokens/s of ours and of the peer, and the ratio, by concurrency."""
    ours = {(row["variant"], row["concurrency"]): row for row in found if row["system"] == "sun"}
    counts = sorted({row["concurrency"] for row in found})
    lines = ["| | our scheme | " + " | ".join(f"{count} requests" for count in counts) + " |", "|---|---|" + "---|" * len(counts)]
    for name in dict.fromkeys(row["variant"] for row in found):
        cells = []
        for count in counts:
            theirs = [row for row in found if (row["variant"], row["concurrency"]) == (name, count) and row["system"] != "sun"]
            cells += [f"{ours[name, count]['tokens_per_s']:.0f} / {row['tokens_per_s']:.0f} = {row['sun_over_it']:.2f}" for row in theirs] or ["-"]
        lines.append(f"| {VARIANTS[name].title} | {VARIANTS[name].scheme} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(found: Sequence[dict], path: Path) -> None:
    """Tokens/s by concurrency, a panel for each of our schemes with the peers that ran beside it."""
    from matplotlib.figure import Figure

    schemes = list(dict.fromkeys(VARIANTS[row["variant"]].scheme for row in found))
    figure = Figure(figsize=(4.6 * len(schemes), 4.8), layout="constrained")
    panels = figure.subplots(1, len(schemes), sharey=True, squeeze=False)[0]
    for axes, scheme in zip(panels, schemes, strict=True):
        here = [row for row in found if VARIANTS[row["variant"]].scheme == scheme]
        counts = sorted({row["concurrency"] for row in here})
        for row_set, name in _lines(here):
            variant = VARIANTS.get(name)
            points = sorted((count, max(values)) for count, values in row_set.items())
            if variant is None:
                style = {"linewidth": 2.6, "color": "#d1495b", "label": f"SUN on Triton, {scheme}"}
            else:
                style = {"linewidth": 1.4, "linestyle": ":" if variant.reference else "-", "label": variant.title}
            axes.plot(*zip(*points, strict=True), marker="o", **style)
        axes.set(xlabel="requests at once, four tasks mixed", xticks=counts, title=f"decode module in {scheme}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    # Once, at the end: a limit set for one panel keeps those that share it from growing with their lines.
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("generated tokens/s, end to end")
    figure.savefig(path, dpi=130)


def write(result: dict, path: Path) -> None:
    """The JSON at ``path`` and the figure beside it."""
    write_result(path, result)
    draw(result["rows"], path.with_suffix(".png"))


def _lines(here: Sequence[dict]) -> list[tuple[dict[int, list[float]], str]]:
    """Concurrency -> tokens/s, for ours (over all duels) and for each variant."""
    found: dict[str, dict[int, list[float]]] = {"sun": {}}
    for row in here:
        name = "sun" if row["system"] == "sun" else row["variant"]
        found.setdefault(name, {}).setdefault(row["concurrency"], []).append(row["tokens_per_s"])
    return [(points, name) for name, points in found.items()]
