"""A smoke run of the load bench on a tiny base, with a real tritonserver: everything it writes, and nothing left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sun.text.prompt import PromptFormat, PromptSettings
from sun_build.base import build_base
from sun_client.client import SunClient
from sun_client.server import Ports
from sun_perf import bench, server_over_engine
from sun_perf.bench_plan import Bench, Plan
from sun_perf.fleet_layout import SYSTEMS, Material, lay_out, task_names
from sun_perf.load import OwnLoad
from sun_perf.running import running, url
from sun_perf.samples import Slo
from sun_perf.workload import Lengths
from tests.server.conftest import REPO, free_ports
from tests.unit import tiny

PLAN = Plan(tasks=1, alphas=(1.2,), requests=20, concurrency=4, prompt=Lengths(4, 0.5, 1, 8), output=Lengths(8, 0.5, 4, 24))


@pytest.fixture
def material(tmp_path: Path) -> Material:
    """A tiny base and an adapter of it."""
    build_base(str(tiny.checkpoint(tmp_path / "source")), tmp_path / "base", PromptSettings())
    return Material(tmp_path / "base", REPO / "backends", [tiny.adapter(tmp_path / "adapter", tmp_path / "base")])


@pytest.fixture
def ports() -> Ports:
    """Three ports that nobody uses now."""
    return free_ports()


def test_conventional_serving_answers_with_each_tasks_own_weights_and_an_interrupt_leaves_nothing_of_it(tmp_path, material, ports):
    adapters = [tiny.adapter(tmp_path / f"adapter{seed}", material.base, seed=seed) for seed in (2, 3)]
    root = lay_out(tmp_path / "root", tmp_path / "full", replace(material, adapters=adapters), SYSTEMS["partitioned"], 2)
    prompt = PromptFormat.load(material.base, PromptSettings()).encode([{"role": "user", "content": "one two"}])
    with pytest.raises(KeyboardInterrupt), running(root, ports) as server, SunClient(url(server)) as client:
        answers = [client.generate(task, "one two", sampling={"temperature": 0, "max_tokens": 8, "ignore_eos": True}).token_ids for task in task_names(2)]
        unfinished = client.stream("task_0", "one two", sampling={"max_tokens": 400, "ignore_eos": True})
        next(unfinished)
        raise KeyboardInterrupt
    assert server.leftovers() == []
    models = [tiny.with_adapter(material.base, adapter) for adapter in adapters]
    assert answers == [tiny.reference(model, model, prompt, 8) for model in models]
    assert answers[0] != answers[1]


def test_a_bench_writes_results_claims_and_figures(tmp_path, material, ports, monkeypatch):
    monkeypatch.setattr("sun_perf.bench_run.CHECKED_CONCURRENCIES", (2,))
    monkeypatch.setattr(server_over_engine, "BATCH", 2)
    scratch, results = tmp_path / "scratch", tmp_path / "results"
    scratch.mkdir()
    found = bench.measure(Bench((PLAN,), memory_tasks=(1,), engine_rounds=1), material, OwnLoad(), ports, Slo(), scratch)
    bench.write(found, results)
    assert [(run["system"], run["mode"]) for run in found["runs"]] == [
        ("partitioned", "closed"), ("sun", "closed"), ("sun", "closed"), ("sun", "open"), ("partitioned", "closed"), ("partitioned", "open")]
    assert all(row["pss_mib"][role] > 0 for row in found["memory"] for role in ("prefill", "decode", "router", "server"))
    claims = json.loads((results / "claims.json").read_text())
    assert claims["throughput_per_worker_sun_over_partitioned"].keys() == claims["tpot_sun_over_partitioned"].keys() == {"1.2"}
    assert claims["server_over_engine"] > 0 and claims["measured"].keys() == {"bench.json"}
    assert sorted(path.name for path in results.iterdir()) == [
        "bench.json", "claims.json", "memory.png", "throughput_per_worker.png", "tpot.png"]
