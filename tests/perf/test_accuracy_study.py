"""Smoke runs of the study on a tiny base: short ones, by their held-out loss."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from sun.text.prompt import PromptSettings
from sun_build.base import build_base
from sun_build.tune.settings import TuneSettings
from sun_perf import accuracy, accuracy_study
from sun_perf.accuracy_plan import Task
from tests.unit import tiny

SHORT = TuneSettings(rank=8, alpha=16, steps=2, batch=2, eval_every=2)


@pytest.fixture
def data(tmp_path: Path, monkeypatch) -> Path:
    """A tiny base, some rows of banking, and no weights of an earlier run."""
    build_base(str(tiny.checkpoint(tmp_path / "source")), tmp_path / "base", PromptSettings())
    rows = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "yes"}]} for i in range(6)]
    (tmp_path / "data" / "banking").mkdir(parents=True)
    (tmp_path / "data" / "banking" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for module in (accuracy, accuracy_study):
        monkeypatch.setattr(module, "BASE", tmp_path / "base")
        monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
        monkeypatch.setattr(module, "HELD_OUT", 2)
    monkeypatch.setattr(accuracy_study, "TASKS", {"banking": Task("banking", "exact", 2, SHORT)})
    return tmp_path / "data"


def test_a_run_gives_its_held_out_loss(data, monkeypatch):
    monkeypatch.setitem(accuracy_study.STUDY, "SUN, LoRA 8", SHORT)
    loss = accuracy_study.run("SUN, LoRA 8", data)
    assert 0 < loss < 3 * math.log(tiny.VOCAB), "no better than a random model whose logits are spread as widely as this one's"


def test_a_distilled_runs_teacher_is_trained_where_there_is_none(data, tmp_path, monkeypatch):
    monkeypatch.setitem(accuracy_study.STUDY, "plain", SHORT)
    monkeypatch.setitem(accuracy_study.STUDY, "distilled", replace(SHORT, distill=0.5))
    accuracy_study.make_teacher(["plain"], data)
    assert not (tmp_path / "runs").exists(), "nobody learns from it"
    accuracy_study.make_teacher(["plain", "distilled"], data)
    assert accuracy_study.run("distilled", data) > 0
    trained = (tmp_path / "runs" / "banking" / "full" / "accuracy.json").stat().st_mtime_ns
    accuracy_study.make_teacher(["distilled"], data)
    assert (tmp_path / "runs" / "banking" / "full" / "accuracy.json").stat().st_mtime_ns == trained
