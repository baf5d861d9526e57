"""A model's shape is read from a Hugging Face configuration, without its weights."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from sun.model.manifest import BaseManifest
from sun.model.shape import load_shape

from . import tiny


@pytest.mark.parametrize("name, billions", [("llama-3.1-8b", 8.03), ("qwen3-8b", 8.19)])
def test_the_shapes_that_come_along_have_the_sizes_of_their_models(name, billions):
    shape = load_shape(name)
    assert round(shape.parameters / 1e9, 2) == billions
    assert (shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, len(shape.rope.inv_freq)) == (4096, 32, 8, 128, 64)


@pytest.mark.parametrize("kind", ["llama3", "qwen2", "qwen3"])
def test_a_checkpoints_shape_is_its_manifests(bases, kind):
    base, shape = BaseManifest.load(bases(kind)), load_shape(bases(kind))
    assert all(getattr(shape, name) == getattr(base, name) for name in ("hidden", "heads", "vocab", "norm_eps", "max_context"))
    geometry = base.geometry
    assert (shape.layers, shape.kv_heads, shape.head_dim) == (geometry.layers, geometry.kv_heads, geometry.head_dim)
    assert (shape.rope.inv_freq, shape.rope.scale) == (geometry.rope.inv_freq, geometry.rope.scale)
    assert shape.kv_bytes(5, 4) == geometry.kv_bytes(5, 4)
    assert shape.biases == (kind == "qwen2") and shape.normed == (kind == "qwen3")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(bases(kind)))
    assert shape.parameters == sum(p.numel() for p in model.parameters() if p.ndim == 2)


def test_a_configuration_of_the_hub_with_its_older_names_is_read(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", "rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "bfloat16",
                                "architectures": ["LlamaForCausalLM"], **tiny.SIZE}))
    assert load_shape(file).rope == load_shape(tmp_path).rope
    assert load_shape(file).rope.inv_freq[1] == pytest.approx(10000 ** (-1 / 6))


def test_what_is_no_configuration_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="config: nowhere is neither a config.json nor one of llama-3.1-8b, qwen3-8b"):
        load_shape("nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="model_type 'mamba' is not supported"):
        load_shape(tmp_path)
