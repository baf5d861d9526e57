"""TensorRT plans: what is asked of the package, by a stand-in of it; and what is said where it is missing. With a GPU, a real plan."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sun.model.manifest import TaskManifest
from sun.prefill.exported import ExportManifest
from sun_build.export import tensorrt
from sun_build.export.entry import Export
from sun_build.export.profiles import profiles
from sun_build.tasks import add_task
from tests.unit import tiny

NAMES = ["model.layers.0.mlp.up_proj.lora_A", "model.layers.0.mlp.up_proj.lora_B"]


METHODS = {
    "Logger", "Builder", "OnnxParser", "Runtime", "Refitter", "Weights",
    "create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network",
    "parse_from_file", "num_errors", "get_error", "clear_flag", "set_flag", "set_shape", "add_optimization_profile", "mark_weights_refittable",
    "create_timing_cache", "set_timing_cache", "get_timing_cache", "serialize",
    "deserialize_cuda_engine", "get_all_weights", "set_named_weights", "refit_cuda_engine", "get_missing_weights", "create_serialization_config", "serialize_with_config"}
"""All that is called of TensorRT 11.4's bindings, but for what runs a plan."""


class StandIn:
    """The part of TensorRT that is used, with the names that the package's bindings have; keeps what it is told."""

    __version__ = "11.4"
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    BuilderFlag = SimpleNamespace(REFIT_INDIVIDUAL="refit", TF32="tf32")
    SerializationFlag = SimpleNamespace(INCLUDE_REFIT="include")
    DataType = SimpleNamespace(FLOAT="float", HALF="half", BF16="bf16")

    def __init__(self, parses: bool = True, weights: list[str] = NAMES):
        self.told: list[tuple] = []
        self.parses, self.weights = parses, weights

    def __getattr__(self, name: str):
        """A method of `METHODS`, of whichever object: told, and answered with what its callers need next."""
        if name not in METHODS:
            raise AttributeError(f"module 'tensorrt' and its objects have no {name!r}, as far as this stand-in knows")

        def call(*arguments):
            self.told.append((name, *arguments))
            answers = {
                "parse_from_file": self.parses, "get_error": "no such operator", "mark_weights_refittable": arguments[:1] != ("odd",),
                "get_all_weights": self.weights, "build_serialized_network": b"plan", "serialize": b"times", "serialize_with_config": b"plan 2"}
            return answers.get(name, self)

        if name == "Logger":
            call.WARNING = 1
        return 2 if name == "num_errors" else call

    def all(self, name: str) -> list[tuple]:
        """The arguments of every call of a method."""
        return [arguments for called, *arguments in self.told if called == name]


def test_a_plan_is_built_for_its_profiles_with_a_refittable_adapter_and_kept_times(tmp_path):
    trt, cache = StandIn(), tmp_path / "run" / "times"
    tensorrt.build_plan(trt, tmp_path / "model.onnx", tmp_path / "plan", profiles(8, 1000), NAMES, cache)
    assert (tmp_path / "plan").read_bytes() == b"plan" and cache.read_bytes() == b"times"
    assert trt.all("set_shape") == [["input_ids", (1, 1), (4, 128), (8, 256)], ["input_ids", (1, 1), (1, 512), (8, 1000)]]
    assert len(trt.all("add_optimization_profile")) == 2 and trt.all("create_network") == [[2]]
    assert ["refit"] in trt.all("set_flag") and trt.all("clear_flag") == [["tf32"]]
    assert [name for (name,) in trt.all("mark_weights_refittable")] == NAMES
    again = StandIn()
    tensorrt.build_plan(again, tmp_path / "model.onnx", tmp_path / "plan", profiles(1, 9), (), cache)
    assert again.all("create_timing_cache") == [[b"times"]] and again.all("set_flag") == []


def test_what_tensorrt_does_not_parse_or_know_is_told_with_its_reasons(tmp_path):
    with pytest.raises(RuntimeError, match="cannot parse model.onnx: no such operator; no such operator"):
        tensorrt.build_plan(StandIn(parses=False), tmp_path / "model.onnx", tmp_path / "plan", profiles(1, 9))
    with pytest.raises(RuntimeError, match="knows no weights odd"):
        tensorrt.build_plan(StandIn(), tmp_path / "model.onnx", tmp_path / "plan", profiles(1, 9), ["odd"])


def test_a_refit_sets_every_weight_and_stays_refittable(tmp_path):
    trt, weights = StandIn(), {name: torch.ones(2, 3, dtype=torch.bfloat16) for name in NAMES}
    (tmp_path / "plan").write_bytes(b"plan")
    tensorrt.refit_plan(trt, tmp_path / "plan", tmp_path / "out", weights)
    assert (tmp_path / "out").read_bytes() == b"plan 2" and ["include"] in trt.all("set_flag")
    assert trt.all("Weights") == [["bf16", tensor.data_ptr(), 6] for tensor in weights.values()]
    assert [name for name, _ in trt.all("set_named_weights")] == NAMES


def test_a_refit_with_another_adapters_layers_is_refused_by_name(tmp_path):
    (tmp_path / "plan").write_bytes(b"plan")
    with pytest.raises(RuntimeError, match=f"differs in {NAMES[1]} and 0 more: build it anew"):
        tensorrt.refit_plan(StandIn(), tmp_path / "plan", tmp_path / "out", {NAMES[0]: torch.ones(2, 3)})


@pytest.fixture
def mine(root, base_dir, tmp_path) -> Path:
    """A root with the task ``mine``, a LoRA adapter."""
    add_task(root / "model_repository", base_dir, "mine", tiny.adapter(tmp_path / "adapter", base_dir))
    return root


def test_without_the_package_or_a_gpu_it_is_said_which_before_anything_is_exported(mine, base_dir, tmp_path, monkeypatch):
    export = Export(mine / "model_repository", base_dir, "mine")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(RuntimeError, match="the package tensorrt does not import .*version that your Triton container has"):
        export.plan(tmp_path / "models")

    def missing(name: str):
        raise OSError(name)

    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(RuntimeError, match="there is no NVIDIA GPU"):
        export.plan(tmp_path / "models")
    assert not (tmp_path / "models").exists()


def traced_nothing(base_dir, task_dir, folder, dtype, merged, opset, max_batch) -> ExportManifest:
    """In place of `export_onnx`."""
    task = TaskManifest.load(task_dir)
    (folder / "model.onnx").write_bytes(b"onnx")
    manifest = ExportManifest(format="onnx", task=task.name, base_digest=task.base_digest, weights_digest=task.weights_digest, dtype=dtype,
                              lora="merged" if merged else "separate", opset=opset, max_batch=max_batch)
    manifest.save(folder)
    return manifest


def test_a_plan_is_an_entry_that_takes_the_tasks_next_adapter(mine, base_dir, tmp_path, monkeypatch):
    models, out = mine / "model_repository", tmp_path / "models"
    export = Export(models, base_dir, "mine", merged=False, max_tokens=300)
    trt = StandIn(weights=list(export.adapter()))
    monkeypatch.setattr(tensorrt, "tensorrt_module", lambda: trt)
    monkeypatch.setattr("sun_build.export.entry.export_onnx", traced_nothing)
    manifest = export.plan(out)
    assert sorted(path.name for path in out.rglob("*")) == ["1", "config.pbtxt", "export.json", "kv_mine", "model.plan"]
    assert (manifest.format, manifest.max_tokens, manifest.parity, manifest.versions["tensorrt"]) == ("tensorrt", 300, None, "11.4")
    assert 'profile: ["0", "1"]' in (out / "kv_mine" / "config.pbtxt").read_text() and (mine / ".run" / "tensorrt.timing").is_file()
    task = add_task(models, base_dir, "mine", tiny.adapter(tmp_path / "other", base_dir, seed=9))
    refitted = export.refit(out)
    assert refitted.weights_digest == task.weights_digest != manifest.weights_digest
    assert refitted == ExportManifest.load(out / "kv_mine" / "1") and (out / "kv_mine" / "1" / "model.plan").read_bytes() == b"plan 2"
    assert 'profile: ["0", "1"]' in (out / "kv_mine" / "config.pbtxt").read_text()
    Export(models, base_dir, "mine").plan(out)
    with pytest.raises(ValueError, match="^export.json lora: is 'merged', a refit needs 'separate'"):
        export.refit(out)


def test_without_onnx_packages_an_export_says_which_to_install(mine, base_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("sun_build.export.onnx.PACKAGES", ("onnx-that-nobody-has",))
    with pytest.raises(RuntimeError, match="^format onnx: install onnx-that-nobody-has$"):
        Export(mine / "model_repository", base_dir, "mine").onnx(tmp_path / "models")
    assert not (tmp_path / "models").exists() and not list(tmp_path.glob(".export-*"))


@pytest.mark.skipif(bool(tensorrt.missing()), reason=tensorrt.missing())
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no GPU to run a plan on")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_real_plan_gives_torchs_kv_and_can_be_refitted(mine, base_dir, tmp_path, dtype):
    export = Export(mine / "model_repository", base_dir, "mine", dtype, merged=False, max_batch=4, max_tokens=300)
    assert export.plan(tmp_path / "models").parity.runtime.startswith("tensorrt")
    add_task(mine / "model_repository", base_dir, "mine", tiny.adapter(tmp_path / "other", base_dir, seed=9))
    refitted = export.refit(tmp_path / "models")
    assert refitted.parity.runtime.startswith("tensorrt") and refitted == ExportManifest.load(tmp_path / "models" / "kv_mine" / "1")
