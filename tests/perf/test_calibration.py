"""Fits find what rows were made from; files and rows that cannot be used are refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun_perf.simulation.calibration import Calibration
from sun_perf.simulation.costs import PrefillRow, PrefillTime, StepRow, StepTime, pairs, passes

BASES = {1: 20.0, 4: 31.0, 16: 60.0}


def step_rows(noise: float = 0.0) -> list[StepRow]:
    rng = np.random.default_rng(0)
    return [StepRow("fp32", 1, batch, context, (base + 0.004 * batch * context) * (1 + noise * rng.standard_normal()))
            for batch, base in BASES.items() for context in (128, 256, 512)]


def test_a_steps_fit_finds_what_its_rows_were_made_from():
    fit = StepTime.from_rows(step_rows())
    assert fit.bases == pytest.approx(tuple(BASES.values())) and fit.per_token == pytest.approx(0.004) and fit.fit.worst < 1e-9
    assert fit.ms(4, 100) == pytest.approx(31 + 1.6)
    assert fit.base(10) == pytest.approx(45.5) and fit.base(28) == pytest.approx(89)


def test_a_noisy_fit_is_near_and_says_its_error():
    fit = StepTime.from_rows(step_rows(noise=0.05))
    assert fit.ms(16, 256) == pytest.approx(60 + 0.004 * 16 * 256, rel=0.05) and 0.005 < fit.fit.median < fit.fit.worst < 0.2


def test_a_longer_context_never_saves_time():
    assert StepTime.from_rows([StepRow("fp32", 1, b, c, 30 + b - c / 1e3) for b in (1, 2) for c in (1, 100)]).per_token == 0


@given(st.floats(0, 30), st.floats(0.01, 3), st.floats(0.0001, 0.01))
def test_a_prefills_fit_finds_what_its_rows_were_made_from(per_pass, per_token, per_pair):
    rows = [PrefillRow(1, n, sum(per_pass + per_token * size + per_pair * pairs(done, size) for done, size in passes(n, 512)), 0.02 * n)
            for n in (32, 128, 512, 600, 1024)]
    fit = PrefillTime.from_rows(rows, 512)
    assert [fit.alone(row.tokens, 512) for row in rows] == pytest.approx([row.ms for row in rows])
    assert fit.pull(100) == pytest.approx(2)


def test_a_prompt_runs_in_passes_of_the_budget():
    assert passes(1000, 512) == [(0, 512), (512, 488)] and passes(0, 512) == []
    assert sum(pairs(*chunk) for chunk in passes(1000, 512)) == pairs(0, 1000) == 500_500


@pytest.mark.parametrize("rows, message", [
    ([], "steps: 0 rows"),
    ([StepRow("fp32", 1, b, 128, 9.0) for b in (1, 2)], "two of each are needed"),
    ([StepRow("fp32", 1, b, c, 0.0) for b in (1, 2) for c in (1, 2)], "ms over 0")])
def test_steps_that_cannot_be_fitted_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        StepTime.from_rows(rows)


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="prompts of three lengths"):
        PrefillTime.from_rows([PrefillRow(1, 8, 1.0, 0.1)], 512)


def test_a_calibration_names_what_it_lacks(tmp_path):
    path = tmp_path / "calibration.json"
    with pytest.raises(ValueError, match="there is no file"):
        Calibration.load(path)
    made = {"machine": {"cpu": "x"}, "commit": "x", "token_budget": 512, "prefill": [],
            "steps": [{"scheme": "fp32", "threads": 1, "batch": 1, "context": 128, "ms": 9}]}
    path.write_text(json.dumps(made))
    with pytest.raises(ValueError, match="scheme: scheme int4 on 1 threads was not measured; the calibration has fp32 on 1. "
                       "Measure anew with `python -m sun_perf.calibrate --scheme fp32 int4 --threads 1`"):
        Calibration.load(path).step_time("int4", 1)
    with pytest.raises(ValueError, match="threads: prefill on 2 threads was not measured; the calibration has nothing. "
                       "Measure anew with `python -m sun_perf.calibrate --scheme fp32 --threads 2`"):
        Calibration.load(path).prefill_time(2)
    del made["steps"][0]["batch"]
    path.write_text(json.dumps(made))
    with pytest.raises(ValueError, match="batch"):
        Calibration.load(path)
