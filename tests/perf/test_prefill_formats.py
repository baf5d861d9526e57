"""The prefill bench: a smoke run on a tiny model."""

from __future__ import annotations

import json

from sun.text.prompt import PromptSettings
from sun_build.base import build_base
from sun_perf import prefill_formats
from tests.unit import tiny


def test_a_run_holds_both_formats_by_length(tmp_path):
    build_base(str(tiny.checkpoint(tmp_path / "source")), tmp_path / "base", PromptSettings())
    task = tiny.task(tmp_path, tmp_path / "base", "plain")
    made = json.loads(json.dumps(prefill_formats.report(tmp_path / "base", task, 1, lengths=(5, 20), rounds=1)))
    assert [(row["scheme"], row["tokens"]) for row in made["passes"]] == [(s, n) for s in ("fp32", "int8") for n in (5, 20)]
    assert all(row["ms"] > 0 for row in made["passes"]) and set(made["over_int8"]) == {"5", "20"}
    assert all(0 < error < 0.1 for error in made["kv_error"].values())
    assert made["machine"]["cpu"] and made["commit"]
