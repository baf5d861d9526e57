"""The step bench: a smoke run on a tiny model, its ratios, and the floor's arithmetic."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sun.model.loading import load_decode
from sun.model.quantise import FULL, SCHEMES
from sun.text.prompt import PromptSettings
from sun_build.base import build_base
from sun_perf import steps
from sun_perf.floor import WEIGHT_BITS, Machine, floor_ms
from tests.unit import tiny

LIMITS = Machine(1, read_gb_s=10.0, fp32_gflop_s=100.0, int8_gflop_s=200.0)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    build_base(str(tiny.checkpoint(folder / "source")), folder / "base", PromptSettings())
    return folder / "base"


def test_a_run_writes_every_scheme_and_batch(base_dir):
    made = json.loads(json.dumps(steps.report(base_dir, ["fp32", "int8"], 1, batches=(1, 3), rounds=1)))
    assert [(row["scheme"], row["batch"]) for row in made["steps"]] == [(s, b) for s in (steps.PLAIN, "fp32", "int8") for b in (1, 3)]
    assert all(row["ms"] > 0 for row in made["steps"])
    assert made["qsun_scheme"] == "int8" and set(made["qsun_over_sun"]) == {"1", "3"}
    assert set(made["step_over_floor"]) == {"fp32", "int8"}
    assert made["machine"]["instructions"] and made["commit"] and made["date"]
    assert made["settings"] == {"schemes": ["fp32", "int8"], "threads": 1, "batches": [1, 3], "rounds": 1}


def test_the_ratio_is_of_rounds_not_of_medians():
    times = {("a", 1): [10.0, 200.0, 30.0], ("b", 1): [5.0, 100.0, 10.0]}
    assert steps.ratio(times, "a", "b", 1) == 2.0


def test_every_scheme_has_a_floor():
    assert set(WEIGHT_BITS) == {FULL, *SCHEMES}


def test_the_floor_is_bytes_at_one_sequence_and_products_at_many(base_dir):
    _, model = load_decode(base_dir)
    size, hidden, inner = tiny.VOCAB, tiny.SIZE["hidden_size"], tiny.SIZE["intermediate_size"]
    weights = size * hidden + 2 * (hidden * hidden * 3 + 3 * hidden * inner)
    kv = 100 * 2 * 2 * 2 * 12 * 4 / 10e9
    assert floor_ms(model, LIMITS, "fp32", 1, 100) == pytest.approx((weights * 4 / 10e9 + kv) * 1e3)
    assert floor_ms(model, LIMITS, "fp32", 64, 100) == pytest.approx((weights * 2 * 64 / 100e9 + 64 * kv) * 1e3)
    assert floor_ms(model, LIMITS, "bf16", 1, 100) == pytest.approx((weights * 2 / 10e9 + kv) * 1e3)
    assert floor_ms(model, LIMITS, "bnb-nf4", 1, 100) == pytest.approx((weights * 4.5 / 8 / 10e9 + kv) * 1e3)
    assert floor_ms(model, replace(LIMITS, bf16_gflop_s=150.0), "int4", 64, 100) == pytest.approx((weights * 2 * 64 / 150e9 + 64 * kv) * 1e3)
    assert floor_ms(model, LIMITS, "int8", 64, 100) == pytest.approx((weights * 2 * 64 / 200e9 + 64 * kv) * 1e3)
