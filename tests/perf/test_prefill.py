"""The prefill bench: a smoke run on a tiny model."""

from __future__ import annotations

import json

import pytest

from sun.text.prompt import PromptSettings
from sun_build.base import build_base
from tests.unit import tiny

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

from sun_perf import prefill


def test_a_run_writes_every_executor_and_length(tmp_path):
    build_base(str(tiny.checkpoint(tmp_path / "source")), tmp_path / "base", PromptSettings())
    task = tiny.task(tmp_path / "repository", tmp_path / "base", "mine")
    made = json.loads(json.dumps(prefill.report(tmp_path / "base", task, ["separate"], 1, lengths=(3, 9), rounds=2)))
    assert set(made["ms"]) == set(made["own_memory_mb"]) == {"torch", "onnx separate"}
    assert all(ms > 0 for row in made["ms"].values() for ms in row.values())
    assert set(made["times_as_fast_as_torch"]["onnx separate"]) == {"3", "9"}
