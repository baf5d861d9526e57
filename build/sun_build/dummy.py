"""A base of random weights for a given geometry (``--load-format dummy``): for timing a model whose weights are not here. Answers mean nothing."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sun.model.manifest import BaseManifest
from sun.model.shape import ARCHITECTURES, config_path, load_config
from sun.model.weights import INDEX_FILE
from sun.readable import readable_json
from sun.text.prompt import PromptSettings
from sun_build.base import check_architecture, embedded, finish_base, load_tokenizer, replacing

LARGE = 1 << 30
"""Weights from which on they lie on disk in bf16, as models of that size are published; a smaller base is float32, as all others are."""


def build_dummy(source: str, out: str | Path, prompt: PromptSettings, seed: int = 0) -> BaseManifest:
    """Lay out a base of random weights in ``out``: everything that takes a base takes it. Memory holds one file, a layer or the embedding, at a time.

    source: see `sun.model.shape.config_path`. The tokeniser is the one beside the configuration, or the embedded base's where there is none.
    Raises ValueError naming the configuration's field that is missing, bad, not supported, or too small for the tokeniser.
    """
    path = config_path(source)
    config = load_config(path)
    check_architecture(config)
    tokenizer = tokenizer_for(path.parent, config.vocab_size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if not (name == "lm_head.weight" and config.tie_word_embeddings)}
    config.dtype = torch.float32 if sum(shape.numel() for shape in shapes.values()) < LARGE else torch.bfloat16
    config.architectures = [ARCHITECTURES[config.model_type]]
    with replacing(Path(out)) as fresh:
        config.save_pretrained(fresh)
        write_weights(fresh, shapes, config.dtype, seed)
        return finish_base(fresh, f"{source} (random weights, seed {seed})", config, tokenizer, prompt)


def tokenizer_for(folder: Path, vocab: int) -> PreTrainedTokenizerFast:
    """The tokeniser in ``folder``, or else the embedded base's. Raises ValueError if it has more than ``vocab`` tokens."""
    own = any(folder.glob("tokenizer*"))
    origin, extra = (str(folder), {}) if own else embedded()
    tokenizer = load_tokenizer(origin, **extra)
    if len(tokenizer) > vocab:
        advice = "" if own else ", which is used because the configuration's folder has none; put one beside it"
        raise ValueError(f"vocab_size: is {vocab}, but must be at least the {len(tokenizer)} of the tokeniser {origin if own else 'that comes along'}{advice}")
    return tokenizer


def write_weights(folder: Path, shapes: dict[str, torch.Size], dtype: torch.dtype, seed: int) -> None:
    """Write random tensors of these names and shapes, a safetensors file for each layer, and their index."""
    draw = torch.Generator().manual_seed(seed)
    groups = [list(names) for _, names in itertools.groupby(shapes, key=layer_of)]
    files: dict[str, str] = {}
    for index, names in enumerate(groups, 1):
        file = f"model-{index:05}-of-{len(groups):05}.safetensors"
        save_file({name: random_tensor(name, shapes[name], dtype, draw) for name in names}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    size = dtype.itemsize * sum(shape.numel() for shape in shapes.values())
    (folder / INDEX_FILE).write_bytes(readable_json({"metadata": {"total_size": size}, "weight_map": files}))


def layer_of(name: str) -> str:
    """The beginning that the tensors of one layer have in common ("model.layers.3"); another tensor's own name."""
    return ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else name


def random_tensor(name: str, shape: torch.Size, dtype: torch.dtype, draw: torch.Generator) -> Tensor:
    """Weights [out, in] of variance 1 / in, so that activations keep their size over many layers; small biases; norms that are 1."""
    if len(shape) == 1 and not name.endswith(".bias"):
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(0, 0.1 if len(shape) == 1 else shape[-1] ** -0.5, generator=draw)
