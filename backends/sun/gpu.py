"""What keeps this machine from using a GPU."""

from __future__ import annotations

import torch


def missing() -> str | None:
    """Why torch has no CUDA device here; None if it has one."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def capability_missing(device: torch.device, least: tuple[int, int]) -> str | None:
    """Why ``device`` is none of at least this compute capability; the CPU counts as able: Triton's interpreter runs there."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= least:
        return None
    return f"needs compute capability {least[0]}.{least[1]}, {torch.cuda.get_device_name(device)} has {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
