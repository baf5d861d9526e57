"""A trained adapter at a lower rank: the best approximation of each layer's change, by its singular values (Eckart-Young).

What is trained at a high rank, which learns faster, is stored and served at the low one's cost; perf/accuracy.md says what the cut
cost three tasks. Training at the low rank was not scored.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sun.model.weights import ADAPTER_FILES


def truncate(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors A' [rank, in], B' [out, rank] of B A for down = A [r, in] and up = B [out, r], in float32."""
    left, mix_left = torch.linalg.qr(up.float())
    right, mix_right = torch.linalg.qr(down.float().T)
    u, s, v = torch.linalg.svd(mix_left @ mix_right.T)
    root = s[:rank].sqrt()
    return root[:, None] * (right @ v[:rank].T).T, (left @ u[:, :rank]) * root


def shrink_adapter(folder: Path, rank: int) -> None:
    """Cut the LoRA adapter in ``folder`` (peft's format) down to ``rank``, in place; one of that rank or less stays as it is."""
    config_file, weights_file = (folder / name for name in ADAPTER_FILES)
    config = json.loads(config_file.read_text())
    if config["r"] <= rank:
        return
    weights = load_file(weights_file)
    for name in [name for name in weights if ".lora_A." in name]:
        other = name.replace(".lora_A.", ".lora_B.")
        made = truncate(weights[name], weights[other], rank)
        for key, tensor in zip((name, other), made, strict=True):
            weights[key] = tensor.to(weights[key].dtype).contiguous()
    # alpha / r scales the product: it stays what it was.
    alpha = config["lora_alpha"] * rank / config["r"]
    config["lora_alpha"], config["r"] = int(alpha) if alpha == int(alpha) else alpha, rank
    save_file(weights, weights_file, metadata={"format": "pt"})
    config_file.write_text(json.dumps(config, indent=2) + "\n")
