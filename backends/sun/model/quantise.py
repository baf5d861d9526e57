"""Low-bit weights of the decode module (QSUN): what each scheme makes of a weight. The KV cache is not touched.

This is each scheme's reference: the float32 weights that its codes stand for. Tuning runs its frozen decode module on
them, and so does serving.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FULL = "fp32"
GROUP = 32
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
"""The 16 levels of NormalFloat4 (QLoRA, arXiv 2305.14314, appendix E)."""


def int8(weight: Tensor) -> Tensor:
    """Symmetric 8-bit codes with one scale per output row."""
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scale).round().clamp(-127, 127) * scale


def int4(weight: Tensor) -> Tensor:
    """4-bit codes with a scale and a minimum per group of `GROUP` inputs."""
    groups = _groups(weight, GROUP)
    low = groups.amin(dim=-1, keepdim=True)
    scale = ((groups.amax(dim=-1, keepdim=True) - low) / 15).clamp_min(torch.finfo(torch.float32).tiny)
    return (((groups - low) / scale).round() * scale + low).view_as(weight)


def nf4(weight: Tensor) -> Tensor:
    """NormalFloat4 codes with one scale (the largest magnitude) per block of 64 inputs."""
    blocks = _groups(weight, 64)
    scale = blocks.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    between = (NF4[1:] + NF4[:-1]) / 2
    return (NF4[torch.bucketize(blocks / scale, between)] * scale).view_as(weight)


def _groups(weight: Tensor, size: int) -> Tensor:
    """weight [out, in] as [out, in / size, size]; a row that does not divide is one group."""
    size = size if weight.shape[1] % size == 0 else weight.shape[1]
    return weight.reshape(weight.shape[0], -1, size)


SCHEMES: dict[str, Callable[[Tensor], Tensor]] = {"int8": int8, "int4": int4, "nf4": nf4}


def check_scheme(scheme: str) -> str:
    """Return ``scheme`` if there is such a one, else raise ValueError naming those there are."""
    if scheme not in (FULL, *SCHEMES):
        raise ValueError(f"decode scheme: got {scheme!r}, expected one of {', '.join((FULL, *SCHEMES))}")
    return scheme


def quantise(tensors: dict[str, Tensor], scheme: str) -> dict[str, Tensor]:
    """A checkpoint's tensors with its linear layers' weights as ``scheme`` has them, in float32; the rest as it is.

    The head always takes 8 bits: it is read whole for each token, and 4 bits there cost the most accuracy. Tied to the
    embedding, it becomes a tensor of its own, because the embedding stays as it is.
    """
    if check_scheme(scheme) == FULL:
        return tensors
    made = {name: SCHEMES[scheme](t.float()) if name.endswith("_proj.weight") else t for name, t in tensors.items()}
    made["lm_head.weight"] = int8(tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).float())
    return made
