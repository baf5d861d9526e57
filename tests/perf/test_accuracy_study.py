"""A smoke run of the study on a tiny base: one short run, by its held-out loss."""

from __future__ import annotations

import json
import math

from sun.text.prompt import PromptSettings
from sun_build.base import build_base
from sun_build.tune.settings import TuneSettings
from sun_perf import accuracy_study
from tests.unit import tiny


def test_a_run_gives_its_held_out_loss(tmp_path, monkeypatch):
    build_base(str(tiny.checkpoint(tmp_path / "source")), tmp_path / "base", PromptSettings())
    rows = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "yes"}]} for i in range(6)]
    (tmp_path / "data" / "banking").mkdir(parents=True)
    (tmp_path / "data" / "banking" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(accuracy_study, "BASE", tmp_path / "base")
    monkeypatch.setattr(accuracy_study, "HELD_OUT", 2)
    monkeypatch.setitem(accuracy_study.STUDY, "SUN, LoRA 8", TuneSettings(rank=8, alpha=16, steps=2, batch=2, eval_every=2))
    loss = accuracy_study.run("SUN, LoRA 8", tmp_path / "data")
    assert 0 < loss < 3 * math.log(tiny.VOCAB), "no better than a random model whose logits are spread as widely as this one's"
