"""The attention bench: every way that can run here computes the formula, a wrong one is refused, and the report says what was skipped."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sun_perf.attention import __main__ as bench
from sun_perf.attention.case import Case, Shape
from sun_perf.attention.ways import WAYS, Numba

SMALL = Shape(heads=6, kv_heads=2, head_dim=32)


class Absent(Numba):
    """A way that this machine lacks something for."""

    title, missing = "absent", "there is no such thing here"


class Wrong(Numba):
    """A way that is a little off."""

    title = "wrong"

    def prepare(self, case):
        run = super().prepare(case)
        return lambda layer: run(layer) + np.float32(1e-3)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.title)
def test_every_way_computes_the_formula_for_ragged_lengths(way):
    if way.missing:
        pytest.skip(way.missing)
    case = Case(batch=5, context=23, layers=2, shape=SMALL)
    assert sorted(case.lengths) == [12, 15, 18, 20, 23]
    run = way.prepare(case)
    bench.check(case, {way.title: run})
    np.testing.assert_array_equal(run(1), run(0).copy())


def test_a_wrong_way_is_refused_by_name():
    case = Case(batch=2, context=9, layers=1, shape=SMALL)
    with pytest.raises(AssertionError, match=r"wrong, batch 2, context 9: off by 0\.001"):
        bench.check(case, {Wrong.title: Wrong().prepare(case)})


def test_a_report_has_all_that_ran_and_why_others_did_not():
    made = json.loads(json.dumps(bench.report((Numba(), Absent()), (1, 3), (8, 20), rounds=1, shape=SMALL, most_bytes=2**14)))
    assert [(row["batch"], row["context"], row["layers"]) for row in made["rows"]] == [(1, 8, 4), (1, 20, 1), (3, 8, 1), (3, 20, 1)]
    assert all(row["ms"][Numba.title] > 0 and row["ours_over_best"] == 1 for row in made["rows"])
    assert made["skipped"] == {"absent": "there is no such thing here"} and set(made["versions"]) == {Numba.title}
    assert made["machine"]["cpu"] and made["commit"] and made["shape"]["head_dim"] == 32
