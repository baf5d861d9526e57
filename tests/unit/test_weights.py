"""Weights are read as they lie on disk, and an adapter that is not plain LoRA is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sun.model.llama import LINEARS, Llama
from sun.model.weights import Linear, as_float32, checkpoint_files, load_lora, map_checkpoint, weights_digest

from . import tiny

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def copy(adapter_dir, tmp_path) -> Path:
    """A copy of the adapter, to be changed."""
    shutil.copytree(adapter_dir, tmp_path / "adapter")
    return tmp_path / "adapter"


def configure(folder: Path, **values) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def deltas(base_dir: Path, folder: Path) -> dict[str, torch.Tensor]:
    """What peft adds to each linear layer's weight."""
    merged = tiny.with_adapter(base_dir, folder).merge_and_unload()
    before, after = tiny.load(base_dir).state_dict(), merged.state_dict()
    return {name: after[name] - before[name] for name in before if name.endswith("_proj.weight")}


@pytest.mark.parametrize("settings", [
    {}, {"r": 3, "lora_alpha": 10}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"target_modules": ["k_proj", "down_proj"]},
])
def test_an_adapter_adds_what_peft_adds(base_dir, tmp_path, settings):
    lora = load_lora(tiny.adapter(tmp_path / "adapter", base_dir, **settings))
    expected = deltas(base_dir, tmp_path / "adapter")
    assert set(lora) == {name.removeprefix("model.").removesuffix(".weight") for name, delta in expected.items() if delta.abs().max() > 0}
    for name, (down, up) in lora.items():
        torch.testing.assert_close(up @ down, expected[f"model.{name}.weight"], rtol=1e-4, atol=1e-5)


def test_an_adapter_of_half_precision_is_computed_in_float32(copy):
    save_file({name: tensor.half() for name, tensor in load_file(copy / TENSORS).items()}, copy / TENSORS)
    assert {tensor.dtype for pair in load_lora(copy).values() for tensor in pair} == {torch.float32}


@pytest.mark.parametrize(("setting", "value"), [
    ("peft_type", "IA3"), ("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]),
    ("alpha_pattern", {"q_proj": 4}), ("fan_in_fan_out", True),
])
def test_a_setting_that_is_not_plain_lora_is_refused_by_name(copy, setting, value):
    configure(copy, **{setting: value})
    with pytest.raises(ValueError, match=rf"^adapter_config\.json: {setting}"):
        load_lora(copy)


def test_a_tensor_that_is_not_lora_on_a_linear_layer_is_refused_by_name(copy):
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    save_file(load_file(copy / TENSORS) | {name: torch.zeros(2, 2)}, copy / TENSORS)
    with pytest.raises(ValueError, match=name):
        load_lora(copy)


def test_half_an_adapter_is_refused_by_name(copy):
    tensors = load_file(copy / TENSORS)
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(tensors, copy / TENSORS)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has only lora_A"):
        load_lora(copy)


def test_an_adapter_for_layers_that_the_base_does_not_have_is_refused_by_name(base, base_dir, adapter_dir):
    lora = load_lora(adapter_dir)
    assert set(lora) == {f"layers.{i}.{name}" for i in range(2) for name in LINEARS}
    with pytest.raises(ValueError, match=r"layers\.7\.mlp\.up_proj"):
        Llama(base, map_checkpoint(base_dir), lora | {"layers.7.mlp.up_proj": lora["layers.1.mlp.up_proj"]})


def test_a_linear_layer_adds_bias_and_adapter():
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    down, up = torch.randn(2, 4), torch.randn(5, 2)
    torch.testing.assert_close(Linear(weight)(x), x @ weight.T)
    torch.testing.assert_close(Linear(weight, bias)(x), x @ weight.T + bias)
    torch.testing.assert_close(Linear(weight, bias, (down, up))(x), x @ (weight + up @ down).T + bias)


def test_a_checkpoint_in_shards_is_the_same_as_in_one_file(base_dir, tmp_path):
    tiny.load(base_dir).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(checkpoint_files(tmp_path)) > 1 and checkpoint_files(base_dir) == [base_dir / "model.safetensors"]
    whole, shards = map_checkpoint(base_dir), map_checkpoint(tmp_path)
    assert whole.keys() == shards.keys() and all(torch.equal(whole[name], shards[name]) for name in whole)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="only safetensors"):
        map_checkpoint(tmp_path)


def test_a_digest_is_of_every_byte_and_the_order_of_the_files(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(bytes(5 << 20))
    b.write_bytes(b"xyz")
    assert weights_digest([a, b]) == "sha256:" + hashlib.sha256(bytes(5 << 20) + b"xyz").hexdigest() != weights_digest([b, a])


def test_float32_weights_are_not_copied_and_others_are_converted():
    weight = torch.randn(2, 2)
    assert as_float32(weight) is weight
    assert torch.equal(as_float32(weight.bfloat16()), weight.bfloat16().float())
