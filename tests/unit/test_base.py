"""A base is laid out with the geometry and digest of its weights, and what the engine does not cover is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GemmaConfig, GPT2Config, LlamaConfig, MistralConfig

from sun.model.manifest import BaseManifest
from sun.text.prompt import PromptFormat, PromptSettings
from sun_build.base import build_base, check_architecture, rope_of

from . import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("source"))


def build(source: Path, out: Path, **prompt) -> BaseManifest:
    return build_base(str(source), out, PromptSettings(**prompt))


def copied(source: Path, out: Path, **config) -> Path:
    """A checkpoint with other values in its config."""
    shutil.copytree(source, out)
    values = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(values | config))
    return out


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_manifest_has_the_geometry_of_the_model(bases, kind):
    manifest, model = BaseManifest.load(bases(kind)), tiny.load(bases(kind))
    key = model.model.layers[0].self_attn.k_proj.weight
    geometry = manifest.geometry
    assert geometry.layers == len(model.model.layers) == (6 if kind == "deep" else 2) and geometry.kv_heads == 2 and manifest.heads == 4
    assert geometry.kv_heads * geometry.head_dim == key.shape[0] and manifest.hidden == key.shape[1] == (64 if kind == "wide" else 48)
    assert geometry.head_dim == (16 if kind in ("qwen3", "wide") else 12)
    assert geometry.kv_bytes(3, 4) == geometry.layers * 2 * 2 * 3 * geometry.head_dim * 4
    rope = model.model.rotary_emb
    assert geometry.rope.inv_freq == rope.inv_freq.tolist() and geometry.rope.scale == rope.attention_scaling
    assert (manifest.vocab, manifest.max_context, manifest.eos_ids) == (tiny.VOCAB, tiny.CONTEXT, [tiny.EOS])
    assert manifest.architecture == model.config.model_type and manifest.norm_eps == model.config.rms_norm_eps


def test_rope_scaling_is_part_of_the_geometry():
    rope = rope_of(LlamaConfig(**tiny.SIZE, rope_parameters=tiny.YARN))
    assert rope.kind == "yarn" and rope.scale == pytest.approx(1.1386, abs=1e-4)
    assert rope_of(LlamaConfig(**tiny.SIZE)).inv_freq[1] == pytest.approx(10000 ** (-1 / 6))


def test_the_same_source_gives_the_same_digest_and_other_weights_another(source, tmp_path):
    first, again = build(source, tmp_path / "a"), build(source, tmp_path / "b")
    assert first.digest == again.digest and first.digest.startswith("sha256:")
    assert build(tiny.checkpoint(tmp_path / "other", seed=1), tmp_path / "c").digest != first.digest


def test_the_digest_covers_rope_and_not_how_the_files_are_cut(source, tmp_path):
    digest = build(source, tmp_path / "a").digest
    turned = copied(source, tmp_path / "turned", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert build(turned, tmp_path / "b").digest != digest
    tiny.load(source).save_pretrained(tmp_path / "cut", max_shard_size="60KB")
    tiny.tokenizer().save_pretrained(tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    assert build(tmp_path / "cut", tmp_path / "c").digest == digest


def test_a_base_is_float32_whatever_its_source_was(source, tmp_path):
    tiny.load(source).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tiny.tokenizer().save_pretrained(tmp_path / "half")
    build(tmp_path / "half", tmp_path / "base")
    model = tiny.load(tmp_path / "base")
    from sun.model.weights import map_checkpoint
    assert {tensor.dtype for tensor in map_checkpoint(tmp_path / "base").values()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, tiny.load(source).lm_head.weight.bfloat16().float())


def test_a_base_has_its_sources_weights_tokeniser_and_template(source, base_dir):
    ours, theirs = tiny.load(base_dir), tiny.load(source)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    prompts = PromptFormat.load(base_dir, PromptSettings())
    assert prompts.tokenizer.chat_template == tiny.TEMPLATE and prompts.tokenizer.get_vocab() == tiny.tokenizer().get_vocab()


def test_all_end_of_turn_tokens_are_kept(source, tmp_path):
    assert build(copied(source, tmp_path / "source", eos_token_id=[3, 290]), tmp_path / "base").eos_ids == [3, tiny.EOS, 290]


def test_the_prompt_settings_are_kept(source, tmp_path):
    build(source, tmp_path / "base", system_prompt="be brief")
    assert BaseManifest.load(tmp_path / "base").prompt == PromptSettings(system_prompt="be brief")


def test_building_again_replaces_the_base(source, tmp_path):
    build(source, tmp_path / "base")
    (tmp_path / "base" / "stale").touch()
    build(source, tmp_path / "base", system_prompt="new")
    assert not (tmp_path / "base" / "stale").exists() and BaseManifest.load(tmp_path / "base").prompt.system_prompt == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["base"], "scratch was left behind"


@pytest.mark.parametrize(("config", "name"), [
    (GPT2Config(n_layer=1, n_head=2, n_embd=8, architectures=["GPT2LMHeadModel"]), "'gpt2' .GPT2LMHeadModel."),
    (GemmaConfig(num_hidden_layers=1, hidden_size=8, architectures=["GemmaForCausalLM"]), "'gemma' .GemmaForCausalLM."),
])
def test_an_unsupported_architecture_is_refused_by_name_and_the_old_base_stays(source, tmp_path, config, name):
    build(source, tmp_path / "base")
    config.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=f"architecture {name} is not supported; supported are llama, mistral, qwen2, qwen3"):
        build(tmp_path / "source", tmp_path / "base")
    assert BaseManifest.load(tmp_path / "base").architecture == "llama"


@pytest.mark.parametrize(("config", "name"), [
    (MistralConfig(**tiny.SIZE, sliding_window=64), "sliding_window 64"),
    (LlamaConfig(**tiny.SIZE, hidden_act="gelu"), "hidden_act 'gelu'"),
    (LlamaConfig(**tiny.SIZE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "rope type 'dynamic'"),
])
def test_an_unsupported_setting_is_refused_by_name(config, name):
    with pytest.raises(ValueError, match=name):
        check_architecture(config)


def test_a_missing_base_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="make one with `sun base`"):
        BaseManifest.load(tmp_path)
