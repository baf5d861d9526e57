"""Figures show all that the results hold."""

from __future__ import annotations

import json

import pytest
from matplotlib.figure import Figure

from sun_perf import figures
from tests.perf.bench_data import run
from tests.perf.test_claims import BENCH

SWEPT = {**BENCH, "runs": [*BENCH["runs"], *(
    run(system, "open", alpha, load=1.2, requests_per_s=4.0 * (1 + alpha), goodput_per_s=3.0 * (1 + alpha))
    for system in ("partitioned", "sun") for alpha in (0.0, 2.0))]}
"""With a second load in every mix, the highest of them in the last one."""
STEPS = {
    "machine": {"cpu": "Some CPU"}, "limits": {"threads": 1}, "context": 256, "qsun_scheme": "int8", "qsun_over_sun": {"1": 3.7, "32": 1.2},
    "step_over_floor": {"fp32": {"1": 1.5, "32": 1.4}, "int8": {"1": 1.6, "32": 2.9}, "int4": {"1": 2.0, "32": 2.0}}}


def cut_off(figure: Figure) -> list[tuple[str, tuple[float, float]]]:
    """Points of lines and corners of bars that lie outside of their panel."""
    figure.draw_without_rendering()
    found = []
    for axes in figure.axes:
        box = axes.bbox.padded(1)
        for line in axes.lines:
            found += [(axes.get_title(), point) for point in line.get_transform().transform(line.get_xydata()) if not box.contains(*point)]
        for bar in axes.patches:
            found += [(axes.get_title(), corner) for corner in bar.get_window_extent().corners() if not box.contains(*corner)]
    return found


@pytest.mark.parametrize(("make", "found"), [
    (figures.throughput_per_worker, SWEPT), (figures.tpot, SWEPT), (figures.goodput, SWEPT), (figures.memory, SWEPT), (figures.steps, STEPS)])
def test_all_that_is_drawn_lies_inside_its_panel(make, found):
    figure = make(found)
    assert all(axes.lines or axes.patches for axes in figure.axes) and cut_off(figure) == []


def test_the_step_figure_has_the_fastest_low_bit_format_beside_fp32():
    left, right = figures.steps(STEPS).axes
    assert [bar.get_height() for bar in left.patches] == [3.7, 1.2]
    assert [bar.get_height() for bar in right.patches] == [1.5, 1.4, 1.6, 2.9]
    assert figures.steps({**STEPS, "qsun_scheme": None}) is None


def test_every_figure_that_the_results_have_something_for_is_drawn(tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(SWEPT))
    paths = figures.draw(tmp_path)
    assert [path.stem for path in paths] == ["throughput_per_worker", "tpot", "goodput", "memory"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    (tmp_path / "steps.json").write_text(json.dumps(STEPS))
    assert figures.draw(tmp_path)[-1] == tmp_path / "steps.png"


def test_one_load_a_mix_makes_no_goodput_and_none_of_an_older_run_stays(tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    (tmp_path / "goodput.png").write_text("of an older run")
    assert "goodput" not in [path.stem for path in figures.draw(tmp_path)] and not (tmp_path / "goodput.png").exists()
