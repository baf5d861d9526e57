"""What an engine needs to know of a model to run it, from a Hugging Face configuration: for modules without a base on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIGS = Path(__file__).parent / "configs"
"""Configurations of models whose weights are not here."""
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""The model types that there are engines for, and transformers' classes of them."""
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
"""What a configuration must say itself: where it does not, transformers would take another model's."""


@dataclass(frozen=True)
class Angles:
    """See `sun.model.manifest.Rope`."""

    inv_freq: list[float]
    scale: float = 1.0


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, by the names that `sun.model.manifest.BaseManifest` and its geometry have.

    inner: the MLP's width. biases: Q, K and V have them (Qwen2). normed: so do norms on Q and K (Qwen3). tied: the head is the embedding.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float
    max_context: int
    rope: Angles
    biases: bool = False
    normed: bool = False
    tied: bool = False

    @property
    def geometry(self) -> Shape:
        """What the KV cache depends on is part of this."""
        return self

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Sizes [out, in] of a layer's linear weights, those with one input together."""
        mixed = self.heads * self.head_dim
        return {
            "qkv": (mixed + 2 * self.kv_heads * self.head_dim, self.hidden), "o": (self.hidden, mixed),
            "gate_up": (2 * self.inner, self.hidden), "down": (self.hidden, self.inner)}

    @property
    def parameters(self) -> int:
        """Weights, without norms and biases."""
        layer = sum(outputs * inputs for outputs, inputs in self.linears.values())
        return self.layers * layer + (1 if self.tied else 2) * self.vocab * self.hidden

    def kv_bytes(self, tokens: int, itemsize: int) -> int:
        """See `sun.model.manifest.Geometry.kv_bytes`."""
        return self.layers * 2 * self.kv_heads * tokens * self.head_dim * itemsize


def head_dim(config: PretrainedConfig) -> int:
    """Size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_kind(config: PretrainedConfig) -> str:
    """The name of the config's RoPE scaling."""
    return (config.rope_parameters or {}).get("rope_type", "default")


def rope_angles(config: PretrainedConfig) -> Angles:
    """inv_freq and scale as transformers computes them, so that serving needs no transformers model code."""
    kind = rope_kind(config)
    if kind == "default":
        dim = head_dim(config)
        theta = config.rope_parameters["rope_theta"]
        return Angles((1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))).tolist())
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return Angles(inv_freq.tolist(), float(scale))


def config_path(name: str | Path) -> Path:
    """The file of a Hugging Face configuration: that itself, its folder, or the name of one of `CONFIGS` ("llama-3.1-8b").

    Raises ValueError naming what there is if there is no such one.
    """
    path = CONFIGS / f"{name}.json"
    if not path.is_file():
        path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.json")))
        raise ValueError(f"config: {name} is neither a config.json nor one of {known}")
    return path


def load_config(path: Path) -> PretrainedConfig:
    """A configuration of Llama's family, by transformers. Raises ValueError naming the file, the field and what it must be."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    kind = values.pop("model_type", None)
    if kind not in ARCHITECTURES:
        raise ValueError(f"{path}: model_type {kind!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    for field in SIZES:
        if field not in values:
            raise ValueError(f"{path}: {field} is missing")
        if type(values[field]) is not int or values[field] < 1:
            raise ValueError(f"{path}: {field}: got {values[field]!r}, expected a whole number of at least 1")
    try:
        config = AutoConfig.for_model(kind, **values)
    except StrictDataclassError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{path}: num_key_value_heads: got {kv_heads}, expected a divisor of the {heads} of num_attention_heads")
    return config


def load_shape(name: str | Path) -> Shape:
    """The shape of a configuration, see `config_path`. Raises ValueError as `load_config` does."""
    config = load_config(config_path(name))
    kind = config.model_type
    return Shape(
        layers=config.num_hidden_layers, hidden=config.hidden_size, inner=config.intermediate_size, heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads, head_dim=head_dim(config), vocab=config.vocab_size, norm_eps=config.rms_norm_eps,
        max_context=config.max_position_embeddings, rope=rope_angles(config), biases=kind == "qwen2", normed=kind == "qwen3",
        tied=config.tie_word_embeddings)
