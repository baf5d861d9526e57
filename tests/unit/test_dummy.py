"""A base of random weights, made of a configuration alone, is a base like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from sun.model.manifest import BaseManifest
from sun.model.weights import checkpoint_files, map_checkpoint
from sun.text.prompt import PromptSettings
from sun_build import dummy
from sun_build.base import checkpoint_digest
from sun_build.dummy import build_dummy

from . import tiny

BARE = {key: value for key, value in tiny.SIZE.items() if key != "initializer_range"}


def configuration(folder: Path, tokenizer: bool = True, **fields) -> Path:
    """A folder with a configuration and, unless told otherwise, a tokeniser; no weights. A field that is None is left out."""
    folder.mkdir()
    values = {"model_type": "llama", **BARE, **fields}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    if tokenizer:
        tiny.tokenizer().save_pretrained(folder)
    return folder


def build(source: Path, out: Path, seed: int = 0) -> BaseManifest:
    return build_dummy(str(source), out, PromptSettings(), seed)


@pytest.mark.parametrize(("kind", "fields", "large"), [
    ("llama", {"rope_parameters": tiny.LLAMA3}, True), ("qwen2", {"tie_word_embeddings": True}, False), ("qwen3", {"head_dim": 16}, False),
])
def test_it_is_served_and_decodes_to_the_tokens_of_transformers(serve, prompts, tmp_path, monkeypatch, kind, fields, large):
    monkeypatch.setattr(dummy, "LARGE", 0 if large else dummy.LARGE)
    manifest = build(configuration(tmp_path / "source", model_type=kind, **fields), tmp_path / "base")
    assert {tensor.dtype for tensor in map_checkpoint(tmp_path / "base").values()} == {torch.bfloat16 if large else torch.float32}
    assert manifest.architecture == kind and manifest.digest == checkpoint_digest(tmp_path / "base")
    tiny.task(tmp_path / "repository", tmp_path / "base", "it")
    model, service = tiny.load(tmp_path / "base"), serve(base=tmp_path / "base", repository=tmp_path / "repository")
    answers = [service.ask(text, "it", max_tokens=12, ignore_eos=True).whole.token_ids for text in ("hello", "good night")]
    asked = [prompts.encode([{"role": "user", "content": text}]) for text in ("hello", "good night")]
    assert answers == [tiny.reference(model, model, prompt, 12) for prompt in asked] and answers[0] != answers[1]


def test_the_manifest_says_that_the_weights_are_random(tmp_path):
    source = configuration(tmp_path / "source")
    build(source, tmp_path / "base", seed=3)
    assert BaseManifest.load(tmp_path / "base").source == f"{source} (random weights, seed 3)"


def test_a_seed_gives_the_same_weights_again_and_another_others(tmp_path):
    source = configuration(tmp_path / "source")
    digests = [build(source, tmp_path / f"base{i}", seed).digest for i, seed in enumerate((1, 1, 2))]
    assert digests[0] == digests[1] != digests[2]


def test_no_file_holds_more_than_a_layer_or_the_embedding_so_that_memory_is_bounded(tmp_path):
    build(configuration(tmp_path / "source", num_hidden_layers=5, vocab_size=1000), tmp_path / "base")
    held = set()
    for file in checkpoint_files(tmp_path / "base"):
        with safe_open(file, "pt") as opened:
            held.add(tuple(opened.keys()))
    assert len(held) == 5 + 3 and {("lm_head.weight",), ("model.embed_tokens.weight",), ("model.norm.weight",)} < held
    assert all(len({name.split(".")[2] for name in names}) == 1 for names in held if len(names) > 1)


def test_activations_keep_their_size_over_the_layers(tmp_path):
    build(configuration(tmp_path / "source", num_hidden_layers=12), tmp_path / "base")
    with torch.no_grad():
        assert 0.3 < float(tiny.load(tmp_path / "base")(torch.arange(9)[None]).logits.std()) < 3


def test_without_a_tokeniser_of_its_own_it_has_the_embedded_bases(tmp_path, monkeypatch):
    comes = configuration(tmp_path / "comes")  # as the real one takes seconds to read
    monkeypatch.setattr(dummy, "embedded", lambda: (str(comes), {}))
    need = len(tiny.tokenizer())
    small = configuration(tmp_path / "small", tokenizer=False, vocab_size=need - 1, eos_token_id=3)
    with pytest.raises(ValueError, match=rf"^vocab_size: is {need - 1}, but must be at least the {need} of the tokeniser that comes along.*put one beside it"):
        build(small, tmp_path / "base")
    assert not (tmp_path / "base").exists()
    build(configuration(tmp_path / "wide", tokenizer=False, vocab_size=need), tmp_path / "base")
    assert (tmp_path / "base" / "tokenizer.json").is_file() and AutoConfig.from_pretrained(tmp_path / "base").vocab_size == need


def test_a_tokeniser_of_its_own_must_fit_too(tmp_path):
    with pytest.raises(ValueError, match=f"^vocab_size: is 100, but must be at least the {len(tiny.tokenizer())} of the tokeniser "):
        build(configuration(tmp_path / "source", vocab_size=100, eos_token_id=3), tmp_path / "base")


@pytest.mark.parametrize(("fields", "told"), [
    ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
    ({"hidden_size": "48"}, "hidden_size: got '48', expected a whole number of at least 1"),
    ({"num_attention_heads": 0}, "num_attention_heads: got 0, expected a whole number of at least 1"),
    ({"vocab_size": True}, "vocab_size: got True"),
    ({"num_key_value_heads": 3}, "num_key_value_heads: got 3, expected a divisor of the 4 of num_attention_heads"),
    ({"head_dim": 13}, "even rotary dimension, but got `head_dim`=13"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"num_attention_heads": 5, "num_key_value_heads": 1}, r"hidden size \(48\) is not a multiple"),
    ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported are llama"),
])
def test_a_field_that_is_missing_or_bad_is_named_with_its_file(tmp_path, fields, told):
    source = configuration(tmp_path / "source", **fields)
    with pytest.raises(ValueError, match=f"^{source / 'config.json'}: .*{told}"):
        build(source, tmp_path / "base")


@pytest.mark.parametrize(("fields", "told"), [
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope type 'spiral' is not supported"),
])
def test_what_no_base_may_have_is_refused_here_too(tmp_path, fields, told):
    with pytest.raises(ValueError, match=told):
        build(configuration(tmp_path / "source", **fields), tmp_path / "base")


def test_a_file_that_is_no_json_and_a_name_that_is_no_file(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: is not JSON"):
        build(tmp_path / "config.json", tmp_path / "base")
    with pytest.raises(ValueError, match="config: nowhere is neither a config.json nor one of llama-3.1-8b, qwen3-8b"):
        build(Path("nowhere"), tmp_path / "base")
