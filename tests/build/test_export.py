"""An exported prefill module gives the KV of the task's torch module, by every way it is run, and says what it is an export of."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
import torch
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tritonclient.grpc.model_config_pb2 import ModelConfig
from typer.testing import CliRunner

from sun.decode.engine import DecodeEngine
from sun.decode.executor import TorchExecutor
from sun.decode.kv_pool import KVPool
from sun.decode.params import SamplingParams
from sun.handoff.inline import Inline
from sun.handoff.kv import hidden_state, verified_kv
from sun.handoff.ticket import parse
from sun.messages import Admit
from sun.model.loading import load_decode, load_prefill
from sun.model.manifest import BaseManifest
from sun.prefill.engine import PrefillEngine
from sun.prefill.exported import INPUT, OUTPUT, STATES, ExportManifest, checkpoint_of, outputs
from sun.prefill.onnx import OnnxExecutor, session
from sun.prefill.padded import PaddedExecutor
from sun.text.prompt import PromptSettings
from sun_build.base import build_base
from sun_build.export.profiles import profiles
from sun_build.export.triton import config_text
from sun_build.tasks import add_task, describe_weights
from sun_client.cli import app
from sun_client.errors import ServerError
from tests.unit import tiny
from tests.unit.harness import PATIENCE_S, within

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

PROMPTS = [[(7 * i + j * j) % tiny.VOCAB for j in range(length)] for i, length in enumerate((1, 2, 37, 3, 64, 9, 70))]
MANIFEST = ExportManifest(format="onnx", task="mine", base_digest="b", weights_digest="w", dtype="fp32", lora="none", opset=18, max_batch=8)


def make_root(folder: Path, kind: str, whole_prompt: bool = False) -> Path:
    """A repository root with a base of ``kind`` and the task ``mine``, a LoRA adapter for it."""
    base_dir, models = folder / "build" / "base", folder / "model_repository"
    models.mkdir(parents=True)
    build_base(str(tiny.checkpoint(folder / "source", kind)), base_dir, PromptSettings())
    adapter = tiny.adapter(folder / "adapter", base_dir)
    describe_weights(base_dir, adapter, "mine", whole_prompt=whole_prompt)
    add_task(models, base_dir, "mine", adapter)
    return folder


def export(root: Path, *words: str) -> str:
    """The output of `sun export` of the task."""
    made = CliRunner().invoke(app, ["export", "--task", "mine", "--root", str(root), *words])
    assert made.exit_code == 0, made.output + str(made.exception)
    return made.output


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A root whose task is served by an ONNX file of its own."""
    root = make_root(tmp_path_factory.mktemp("root"), "llama")
    said = export(root, "--executor", "onnx")
    error, largest = re.search(r"largest error (\S+), largest value (\S+)\.", said).groups()
    assert float(error) < 1e-4 * float(largest)
    return root


def engine(root: Path, executor: str, **settings) -> PrefillEngine:
    """The task's prefill engine with an executor as `sun_prefill` would choose it; Triton's model is a session here."""
    folder = root / "model_repository" / "prefill_mine" / "1"
    task, model = load_prefill(root / "build" / "base", folder)
    made = None
    if executor == "onnx":
        made = OnnxExecutor(folder, checkpoint_of(root / "build" / "base", folder, task), model.base, task)
    if executor == "triton":
        loaded, _ = session(folder / "model.onnx", 1)
        names = list(outputs(task.whole_prompt))
        made = PaddedExecutor(lambda ids: [torch.from_numpy(x) for x in loaded.run(names, {INPUT: ids.numpy()})], folder, model.base, task)
    return PrefillEngine(model, task, Inline(), executor=made, **settings)


def shipments(root: Path, executor: str, prompts: list[list[int]], **settings) -> list[list[bytes]]:
    """The tickets and KV of prompts that are there at once."""
    prefill = engine(root, executor, **settings)
    try:
        return [future.result(PATIENCE_S) for future in [prefill.submit(ids) for ids in prompts]]
    finally:
        within(prefill.close)


def kv(shipment: list[bytes]) -> torch.Tensor:
    ticket = parse(shipment[0])
    with Inline().pull(ticket, shipment) as buffer:
        return verified_kv(ticket, buffer)


@pytest.mark.parametrize("executor", ["onnx", "triton"])
def test_kv_of_every_producer_is_that_of_torch(root, executor):
    wanted, got = (shipments(root, name, [*PROMPTS, [], PROMPTS[4]], token_budget=80) for name in ("torch", executor))
    for one, other in zip(wanted, got, strict=True):
        mine, theirs = kv(other), kv(one)
        largest = float(theirs.abs().max()) if theirs.numel() else 0.0
        assert mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=0, atol=1e-5 * largest)
        tickets = parse(one[0]), parse(other[0])
        assert msgspec.structs.replace(tickets[0], checksum="") == msgspec.structs.replace(tickets[1], checksum="")


@pytest.mark.parametrize("executor", ["onnx", "triton"])
def test_greedy_tokens_after_every_producer_are_those_after_torch(root, executor):
    base, model = load_decode(root / "build" / "base")
    pool = KVPool(base.geometry, 2048)
    decode = DecodeEngine(base, TorchExecutor(model, pool), pool, [Inline()])
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    for name in ("torch", executor):
        for i, (ids, shipment) in enumerate(zip(PROMPTS, shipments(root, name, [ids[:-1] for ids in PROMPTS]), strict=True)):
            decode.admit(Admit(id=f"{name} {i}", router="r", task="mine", prompt=ids, params=params), shipment)
    tokens: dict[str, list[int]] = {}
    for event in within(lambda: [e for steps in decode.outbox.listen("r") for step in steps for e in step.events]):
        tokens.setdefault(event.id, []).append(event.token)
    within(decode.close)
    for i in range(len(PROMPTS)):
        assert len(tokens[f"torch {i}"]) == 12 and tokens[f"{executor} {i}"] == tokens[f"torch {i}"]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("lora", ["merged", "separate"])
def test_of_whole_prompts_the_last_tokens_state_is_torchs_too(tmp_path, kind, lora):
    root = make_root(tmp_path / "root", kind, whole_prompt=True)
    export(root, "--executor", "onnx", "--lora", lora)
    known = shipments(root, "torch", PROMPTS)
    for executor in ("onnx", "triton"):
        for one, other in zip(known, shipments(root, executor, PROMPTS, token_budget=80), strict=True):
            for read in (verified_kv, hidden_state):
                with Inline().pull(parse(one[0]), one) as theirs, Inline().pull(parse(other[0]), other) as mine:
                    torch.testing.assert_close(read(parse(other[0]), mine), read(parse(one[0]), theirs), rtol=1e-4, atol=1e-4)


def test_an_export_of_the_other_kind_of_task_is_refused(root, tmp_path):
    other = make_root(tmp_path / "root", "llama", whole_prompt=True)
    folder = other / "model_repository" / "prefill_mine" / "1"
    task, _ = load_prefill(other / "build" / "base", folder)
    msgspec.structs.replace(MANIFEST, base_digest=task.base_digest, weights_digest=task.weights_digest).save(folder)
    with pytest.raises(ValueError, match="^export.json states: is False, here it must be True: export it again"):
        engine(other, "onnx")


def test_an_export_that_merged_nothing_uses_the_weights_from_the_base(tmp_path):
    root = make_root(tmp_path / "root", "qwen2")
    export(root, "--executor", "onnx", "--lora", "separate")
    wanted, got = (kv(shipments(root, name, PROMPTS[2:3])[0]) for name in ("torch", "onnx"))
    assert torch.allclose(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    # They are not read from the file: the base's come to another KV.
    base = root / "build" / "base" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(base).items()}
    for name in tensors:
        tensors[name] *= 2 if name.endswith("k_proj.weight") else 1
    save_file(tensors, base.with_name("other"))
    base.with_name("other").replace(base)
    assert not torch.allclose(kv(shipments(root, "onnx", PROMPTS[2:3])[0]), wanted, rtol=0, atol=0.1)


def test_an_export_for_triton_is_an_entry_whose_file_has_the_adapter_by_name(tmp_path):
    root = make_root(tmp_path / "root", "qwen3")
    said = export(root, "--out", str(tmp_path / "models"), "--lora", "separate", "--dtype", "fp16", "--opset", "23", "--max-batch", "4")
    assert "adapter separate" in said and "executor" not in (root / "model_repository" / "prefill_mine" / "config.pbtxt").read_text()
    entry = tmp_path / "models" / "kv_mine"
    assert sorted(path.name for path in tmp_path.joinpath("models").iterdir()) == ["kv_mine"]
    assert sorted(path.name for path in entry.joinpath("1").iterdir()) == ["export.json", "model.onnx", "model.onnx.data"]
    config = text_format.Parse(entry.joinpath("config.pbtxt").read_text(), ModelConfig())
    assert (config.backend, config.max_batch_size, list(config.output[0].dims)) == ("onnxruntime", 4, [2, 2, 2, -1, 16])
    names = {tensor.name for tensor in onnx.load(entry / "1" / "model.onnx", load_external_data=False).graph.initializer}
    assert "model.layers.0.mlp.up_proj.lora_A" in names and "model.layers.1.self_attn.v_proj.lora_B" in names
    assert not any(name.startswith("model.layers.1.mlp") for name in names), "the KV does not depend on it"
    assert ExportManifest.load(entry / "1").parity.max_error > 0


def test_a_stale_export_is_refused_by_field_and_a_missing_one_with_what_to_do(root, tmp_path):
    other = make_root(tmp_path / "root", "llama")
    folder = other / "model_repository" / "prefill_mine" / "1"
    with pytest.raises(FileNotFoundError, match="make one with `sun export`"):
        engine(other, "onnx")
    msgspec.structs.replace(ExportManifest.load(root / "model_repository" / "prefill_mine" / "1"), weights_digest="sha256:old").save(folder)
    with pytest.raises(ValueError, match="^export.json weights_digest: is 'sha256:old'.*export it again"):
        engine(other, "onnx")


def test_a_task_that_the_server_does_not_load_by_its_export_keeps_the_executor_it_had(tmp_path, monkeypatch):
    def refused(*_):
        raise ServerError("the server did not load prefill_mine")

    root = make_root(tmp_path, "llama")
    config = root / "model_repository" / "prefill_mine" / "config.pbtxt"
    before = config.read_text()
    monkeypatch.setattr("sun_client.show.load", refused)
    result = CliRunner().invoke(app, ["export", "--task", "mine", "--executor", "onnx", "--root", str(root)])
    assert isinstance(result.exception, ServerError) and "has executor" not in result.output
    assert config.read_text() == before


def test_adding_the_task_again_takes_its_export_and_executor_away(tmp_path):
    root = make_root(tmp_path / "root", "llama")
    prefill = root / "model_repository" / "prefill_mine"
    MANIFEST.save(prefill / "1")
    add_task(root / "model_repository", root / "build" / "base", "mine")
    assert not (prefill / "1" / "export.json").exists() and "executor" not in (prefill / "config.pbtxt").read_text()


@pytest.mark.parametrize(("words", "reason"), [
    (["--task", "other", "--out", "x"], "there is no task 'other'; the tasks here are mine"),
    (["--task", "mine"], "--out: name a folder"),
    (["--task", "mine", "--executor", "onnx", "--out", "x"], "--executor: onnx keeps"),
    (["--task", "mine", "--executor", "tensorrt"], "--executor: tensorrt keeps its file, of --format tensorrt"),
    (["--task", "mine", "--executor", "tensorrt", "--format", "tensorrt", "--refit"], "--executor: tensorrt keeps its file, of --format tensorrt"),
    (["--task", "mine", "--executor", "triton", "--out", "x"], "--out: executor triton"),
    (["--task", "mine", "--out", "x", "--format", "gguf"], "--format: got 'gguf', expected one of onnx, tensorrt"),
    (["--task", "mine", "--out", "x", "--dtype", "int3"], "dtype: got 'int3', expected one of fp32, bf16, fp16"),
    (["--task", "mine", "--executor", "onnx", "--dtype", "bf16"], "--dtype: ONNX Runtime does not compute bf16 on the CPU"),
    (["--task", "mine", "--executor", "triton", "--cpu", "--dtype", "bf16"], "--dtype: ONNX Runtime does not compute bf16 on the CPU"),
    (["--task", "mine", "--out", "x", "--cpu", "--dtype", "bf16"], "--dtype: ONNX Runtime does not compute bf16 on the CPU"),
])
def test_what_cannot_be_exported_is_refused_by_option(root, words, reason):
    refused = CliRunner().invoke(app, ["export", "--root", str(root), *words])
    assert refused.exit_code and reason in str(refused.exception)


@given(st.integers(1, 64), st.integers(1, 8192), st.data())
def test_some_profile_covers_every_allowed_shape(max_batch, max_tokens, data):
    made = profiles(max_batch, max_tokens)
    shape = data.draw(st.tuples(st.integers(1, max_batch), st.integers(1, max_tokens)))
    assert all(low <= size <= high for low, size, high in zip(made[-1].least, shape, made[-1].most, strict=True))
    for profile in made:
        assert all(a <= b <= c for a, b, c in zip(profile.least, profile.best, profile.most, strict=True))
        assert profile.most[0] == max_batch and profile.most[1] <= max_tokens


def test_a_plans_config_names_its_profiles(base_dir):
    manifest = msgspec.structs.replace(MANIFEST, format="tensorrt")
    config = text_format.Parse(config_text(manifest, BaseManifest.load(base_dir), 2), ModelConfig())
    assert (config.name, config.platform, config.max_batch_size) == ("", "tensorrt_plan", 8)
    group = config.instance_group[0]
    assert (group.kind, list(group.profile)) == (group.KIND_GPU, ["0", "1"])
    assert [(t.name, list(t.dims)) for t in (*config.input, *config.output)] == [(INPUT, [-1]), (OUTPUT, [2, 2, 2, -1, 12])]
    config = text_format.Parse(config_text(msgspec.structs.replace(manifest, states=True), BaseManifest.load(base_dir), 2), ModelConfig())
    assert [(t.name, list(t.dims)) for t in config.output] == [(OUTPUT, [2, 2, 2, -1, 12]), (STATES, [-1, BaseManifest.load(base_dir).hidden])]
