"""The compared systems are laid out as they are meant to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sun.model.loading import load_decode, load_prefill
from sun.model.weights import map_checkpoint
from sun.messages import Load
from sun.router.policy import Partitioned, parse_owners
from sun.text.prompt import PromptSettings
from sun_build.base import build_base
from sun_perf.fleet_layout import KV_TOKENS, SYSTEMS, Material, lay_out, merge, task_names
from tests.unit import tiny


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A tiny base and two adapters of it."""
    folder = tmp_path_factory.mktemp("material")
    build_base(str(tiny.checkpoint(folder / "source")), folder / "base", PromptSettings())
    adapters = [tiny.adapter(folder / f"adapter{seed}", folder / "base", seed=seed) for seed in (1, 2)]
    return Material(folder / "base", folder / "backends", adapters, threads=3, scheme="nf4")


def parameters(root: Path, model: str) -> dict[str, str]:
    """What a model's config.pbtxt sets."""
    lines = (root / "model_repository" / model / "config.pbtxt").read_text().splitlines()
    words = [line.split('"') for line in lines if line.startswith("parameters")]
    return {line[1]: line[3] for line in words}


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("tasks", [1, 3, 4])
def test_every_system_has_its_workers_and_the_same_cores_and_slots(tmp_path, material, name, tasks):
    system = SYSTEMS[name]
    root = lay_out(tmp_path / "root", tmp_path / "full", material, system, tasks)
    workers = [parameters(root, f"decode_{i}") for i in range(system.workers(tasks))]
    assert not (root / "model_repository" / f"decode_{len(workers)}").exists()
    assert KV_TOKENS - len(workers) < sum(int(worker["kv_tokens"]) for worker in workers) <= KV_TOKENS
    assert {worker["threads"] for worker in workers} == {parameters(root, "prefill_task_0")["threads"]} == {"3"}
    assert {worker["scheme"] for worker in workers} == {"nf4" if name == "qsun" else "fp32"}


def test_a_conventional_task_decodes_with_the_weights_it_prefills_with(tmp_path, material):
    root = lay_out(tmp_path / "root", tmp_path / "full", material, SYSTEMS["partitioned"], 3)
    router = parameters(root, "sun")
    owners = parse_owners(router["owners"], [f"decode_{i}" for i in range(3)])
    assert router["policy"] == "partitioned" and list(owners) == task_names(3)
    assert Partitioned(owners).pick("task_2", {f"decode_{i}": Load(0, 0) for i in range(3)}) == "decode_2"
    for task, (worker,) in owners.items():
        manifest, _ = load_prefill(material.base, root / "model_repository" / f"prefill_{task}" / "1")
        assert manifest.weights == "full"
        weights = Path(parameters(root, worker)["weights"]) / "model.safetensors"
        assert weights.samefile(root / "model_repository" / f"prefill_{task}" / "1" / "model.safetensors")
        load_decode(material.base, own=weights.parent)


def test_every_task_has_a_weights_file_of_its_own(tmp_path, material):
    lay_out(tmp_path / "root", tmp_path / "full", material, SYSTEMS["partitioned"], 4)
    assert len({path.stat().st_ino for path in (tmp_path / "full").glob("*/model.safetensors")}) == 4


def test_shared_workers_decode_with_the_base(tmp_path, material):
    root = lay_out(tmp_path / "root", tmp_path / "full", material, SYSTEMS["sun"], 4)
    assert parameters(root, "sun") == {"policy": "pack"} and "weights" not in parameters(root, "decode_0")
    assert not (tmp_path / "full").exists()
    manifest = json.loads((root / "model_repository" / "prefill_task_3" / "1" / "task.json").read_text())
    assert manifest["weights"] == "lora"


def test_merged_weights_are_what_peft_makes_of_them(tmp_path, material):
    merge(material.base, material.adapters[0], tmp_path / "merged")
    ours, theirs = map_checkpoint(tmp_path / "merged"), tiny.with_adapter(material.base, material.adapters[0]).merge_and_unload().state_dict()
    assert ours.keys() <= theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name])
