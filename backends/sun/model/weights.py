"""Weights on disk: memory-mapped safetensors, peft's LoRA adapters, and the linear layers made of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from sun.model.codes import Codes

INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
LORA_NAME = re.compile(r"(?:base_model\.model\.)?model\.(layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)\.lora_([AB])\.weight")


def checkpoint_files(directory: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint directory (one, or the shards its index names)."""
    directory = Path(directory)
    index = directory / INDEX_FILE
    if index.is_file():
        return sorted(directory / name for name in set(json.loads(index.read_text())["weight_map"].values()))
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    raise FileNotFoundError(f"{directory}: no model.safetensors (only safetensors checkpoints are read)")


def map_checkpoint(directory: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint by name, memory-mapped: processes that map the same files share their pages."""
    tensors = {}
    for path in checkpoint_files(directory):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})
    return tensors


def weights_digest(files: list[Path]) -> str:
    """sha256 over the bytes of ``files`` in order, as ``sha256:<hex>``."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


class Linear:
    """y = x W^T (+ b) (+ the LoRA path x A^T B^T), without a merged copy: W may be shared with other tasks' processes.

    codes: x is first rounded to them, as the layer's integer form does.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, lora: tuple[Tensor, Tensor] | None = None, codes: Codes | None = None):
        self.weight, self.bias, self.lora, self.codes = weight, bias, lora, codes

    def __call__(self, x: Tensor) -> Tensor:
        x = x if self.codes is None else self.codes.rounded(x)
        y = F.linear(x, self.weight, self.bias)
        if self.lora is None:
            return y
        down, up = self.lora
        return y + F.linear(F.linear(x, down), up)


def joined(linears: Sequence[Linear], device: torch.device) -> Linear:
    """Linear layers of one input as one on ``device``, in float32, their adapters merged into it there."""
    weights = []
    for linear in linears:
        weight = linear.weight.to(device)
        if linear.lora is not None:
            down, up = (half.to(device) for half in linear.lora)
            weight = weight + up @ down
        weights.append(weight)
    bias = None
    if any(linear.bias is not None for linear in linears):
        bias = torch.cat([torch.zeros(len(each.weight)) if each.bias is None else each.bias for each in linears]).to(device)
    return Linear(torch.cat(weights), bias)


def load_lora(directory: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read peft's adapter files: layer name ("layers.0.mlp.up_proj") -> (A [r, in], scaled B [out, r]), float32.

    Raises ValueError naming the setting of ``adapter_config.json`` or the tensor that is not plain LoRA on linear layers.
    """
    directory = Path(directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    if config.get("peft_type") != "LORA":
        raise ValueError(f"adapter_config.json: peft_type {config.get('peft_type')!r} is not supported, only LORA")
    for key, plain in {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None, "alpha_pattern": {}}.items():
        if config.get(key, plain) not in (plain, None):
            raise ValueError(f"adapter_config.json: {key}={config[key]!r} is not supported, only {plain!r}")
    halves: dict[str, dict[str, Tensor]] = {}
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():
            match = LORA_NAME.fullmatch(name)
            if match is None:
                raise ValueError(f"adapter_model.safetensors: tensor {name!r} is not LoRA on a linear layer of the decoder")
            halves.setdefault(match[1], {})[match[2]] = file.get_tensor(name).float()
    adapters = {}
    for name, half in halves.items():
        if set(half) != {"A", "B"}:
            raise ValueError(f"adapter_model.safetensors: {name} has only lora_{''.join(half)}")
        rank = half["A"].shape[0]
        scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        adapters[name] = (half["A"].contiguous(), (half["B"] * scale).contiguous())
    return adapters


def as_float32(tensor: Tensor) -> Tensor:
    """The tensor itself if it is float32 (still memory-mapped), else a converted copy."""
    return tensor if tensor.dtype is torch.float32 else tensor.float()
