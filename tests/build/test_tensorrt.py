"""TensorRT plans: what is asked of the package, by a stand-in of it; and what is said where it is missing. With a GPU, a real plan."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import msgspec
import pytest
import torch

from sun.handoff.inline import Inline
from sun.handoff.kv import verified_kv
from sun.handoff.ticket import parse
from sun.model.loading import load_prefill
from sun.model.manifest import TaskManifest
from sun.prefill import executors
from sun.prefill.engine import PrefillEngine
from sun.prefill.exported import PLAN_FILE, ExportManifest
from sun.prefill.onnx import OnnxExecutor
from sun.prefill.padded import PaddedExecutor
from sun.prefill.tensorrt import Plan, missing
from sun_build.config_file import parameter, set_parameter
from sun_build.export import tensorrt
from sun_build.export.entry import Export
from sun_build.export.parity import torch_outputs
from sun_build.export.profiles import profiles
from sun_build.tasks import add_task
from tests.unit import tiny
from tests.unit.harness import PATIENCE_S, within

NAMES = ["model.layers.0.mlp.up_proj.lora_A", "model.layers.0.mlp.up_proj.lora_B"]


METHODS = {
    "Logger", "Builder", "OnnxParser", "Runtime", "Refitter", "Weights",
    "create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network",
    "parse_from_file", "num_errors", "get_error", "clear_flag", "set_flag", "set_shape", "add_optimization_profile", "mark_weights_refittable",
    "create_timing_cache", "set_timing_cache", "get_timing_cache", "serialize",
    "deserialize_cuda_engine", "get_all_weights", "set_named_weights", "refit_cuda_engine", "get_missing_weights", "create_serialization_config",
    "serialize_with_config"}
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


class Running:
    """TensorRT as a plan is run with: of `model`, on addresses, as its context computes."""

    __version__ = "11.4"
    num_optimization_profiles = 2

    class Logger:
        WARNING = 1

        def __init__(self, level: int): ...

    def __init__(self, model, reads: bool = True, runs: bool = True):
        self.model, self.reads, self.runs = model, reads, runs
        self.shapes: list[tuple[int, ...]] = []
        self.addresses: dict[str, int] = {}

    def Runtime(self, logger):
        return self

    def deserialize_cuda_engine(self, plan: bytes):
        return self if self.reads and plan == b"plan" else None

    def create_execution_context(self):
        return self

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert profile == 1
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "input_ids"
        self.shapes.append(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        geometry, (batch, length) = self.model.geometry, self.shapes[-1]
        return batch, geometry.layers, 2, geometry.kv_heads, length, geometry.head_dim

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        batch, length = self.shapes[-1]
        ids = torch.frombuffer((ctypes.c_int64 * (batch * length)).from_address(self.addresses["input_ids"]), dtype=torch.int64).view(batch, length)
        kv = torch.stack([torch_outputs(self.model, row)[0] for row in ids])
        ctypes.memmove(self.addresses["kv"], kv.data_ptr(), kv.nbytes)
        return self.runs


@pytest.fixture
def planned(mine, base_dir, monkeypatch):
    """planned(**settings) -> the stand-in; the task has a plan beside its weights."""
    folder = mine / "model_repository" / "prefill_mine" / "1"
    task, model = load_prefill(base_dir, folder)

    def make(**settings) -> Running:
        (folder / PLAN_FILE).write_bytes(b"plan")
        msgspec.structs.replace(traced_nothing(base_dir, folder, folder, "fp32", True, 18, 4), format="tensorrt").save(folder)
        running = Running(model, **settings)
        monkeypatch.setitem(sys.modules, "tensorrt", running)
        return running

    make.folder, make.task, make.model = folder, task, model
    return make


def test_a_plan_that_prefill_runs_itself_gives_torchs_kv_in_padded_batches(planned):
    running, prompts = planned(), [[5] * 20, [7, 8, 9] * 6, [1, 2]]
    executor = PaddedExecutor(Plan(planned.folder / PLAN_FILE, "cpu"), planned.folder, planned.model.base, planned.task, "tensorrt")
    engine = PrefillEngine(planned.model, planned.task, Inline(), executor=executor)
    for ids, future in [(ids, engine.submit(ids)) for ids in prompts]:
        shipment = future.result(PATIENCE_S)
        with Inline().pull(ticket := parse(shipment[0]), shipment) as buffer:
            torch.testing.assert_close(verified_kv(ticket, buffer), torch_outputs(planned.model, torch.tensor(ids))[0], rtol=1e-4, atol=1e-4)
    within(engine.close)
    assert sum(batch for batch, _ in running.shapes) == 3


def test_a_plan_of_another_version_or_that_does_not_run_says_so(planned):
    planned(reads=False)
    with pytest.raises(RuntimeError, match="^TensorRT 11.4 cannot read .*model.plan: a plan is for the version"):
        Plan(planned.folder / PLAN_FILE, "cpu")
    planned(runs=False)
    with pytest.raises(RuntimeError, match="TensorRT did not run the plan"):
        Plan(planned.folder / PLAN_FILE, "cpu")(torch.zeros(1, 3, dtype=torch.int64))


def test_an_export_in_another_format_is_refused_by_it(planned):
    planned()
    with pytest.raises(ValueError, match="export.json format: is 'tensorrt', here it must be 'onnx'"):
        OnnxExecutor(planned.folder, planned.folder, planned.model.base, planned.task)


def test_a_plan_for_prefill_itself_lies_beside_the_tasks_weights_until_they_change(mine, base_dir, tmp_path, monkeypatch):
    models = mine / "model_repository"
    monkeypatch.setattr(tensorrt, "tensorrt_module", StandIn)
    monkeypatch.setattr("sun_build.export.entry.export_onnx", traced_nothing)
    Export(models, base_dir, "mine").plan(None)
    folder, config = models / "prefill_mine" / "1", models / "prefill_mine" / "config.pbtxt"
    assert (folder / PLAN_FILE).read_bytes() == b"plan" and ExportManifest.load(folder).format == "tensorrt" and not (models / "kv_mine").exists()
    set_parameter(config, "executor", "tensorrt")
    config.write_text(config.read_text().replace("KIND_CPU", "KIND_GPU"))
    add_task(models, base_dir, "mine", tiny.adapter(tmp_path / "other", base_dir, seed=9))
    # The GPU that the instance group names goes on to be used, by torch.
    assert not (folder / PLAN_FILE).exists() and parameter(models, "prefill_mine", "executor") == "cuda" and "KIND_GPU" in config.read_text()


def test_where_a_plan_cannot_run_the_executor_says_why(mine, base_dir):
    if reason := executors.why_not("tensorrt"):
        with pytest.raises(RuntimeError, match="^executor: tensorrt does not run here: ") as raised:
            executors.load(base_dir, mine / "model_repository" / "prefill_mine" / "1", "tensorrt", "fp32", "cuda:0")
        assert reason in str(raised.value)


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no GPU to run a plan on")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_real_plan_gives_torchs_kv_and_can_be_refitted(mine, base_dir, tmp_path, dtype):
    export = Export(mine / "model_repository", base_dir, "mine", dtype, merged=False, max_batch=4, max_tokens=300)
    assert export.plan(tmp_path / "models").parity.runtime.startswith("tensorrt")
    add_task(mine / "model_repository", base_dir, "mine", tiny.adapter(tmp_path / "other", base_dir, seed=9))
    refitted = export.refit(tmp_path / "models")
    assert refitted.parity.runtime.startswith("tensorrt") and refitted == ExportManifest.load(tmp_path / "models" / "kv_mine" / "1")
