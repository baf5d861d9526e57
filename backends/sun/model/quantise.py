"""Low-bit decode modules (QSUN): what each scheme makes of a linear layer's weight and input. The KV cache is not touched.

This is each scheme's reference: the float32 numbers that its codes stand for. Tuning runs its frozen decode module on
them; serving packs the same codes (`sun.decode.packed`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sun.model.codes import COARSE, FINE, Codes, smoothing

FULL = "fp32"
HEAD = "lm_head"
GROUP = 32
BLOCK = 64
"""Inputs that share a scale: in int4, and in NormalFloat4."""
OUTLIER = 6.0
"""Inputs of this magnitude and more do not become integers in LLM.int8 (arXiv 2208.07339, section 3.2)."""
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])
"""The 16 levels of NormalFloat4 (QLoRA, arXiv 2305.14314, appendix E)."""


def codes_for(scheme: str, layer: str, columns: Tensor | None = None) -> Codes | None:
    """The integer codes of a layer ("mlp.down_proj", "lm_head"); None where its inputs stay float.

    columns: what calibration found for the layer, see `quantise`. An int8 layer without has outliers that 8 bits do not
    carry, see `edges`. The head is read whole for each token, and 4 bits there cost the most accuracy: it has 8 in every low-bit scheme.
    """
    if scheme == "bnb-int8" and columns is not None:
        return Codes(FINE, split=False, whole=columns.bool())
    if scheme in (FULL, "bf16") or (scheme != "int8" and layer != HEAD):
        return None
    return Codes(FINE, split=True) if columns is None else Codes(COARSE, split=False, smooth=columns)


def bf16(weight: Tensor) -> Tensor:
    """bfloat16: float32 with 8 bits of precision left of 24."""
    return weight.bfloat16().float()


def int4(weight: Tensor) -> Tensor:
    """4-bit codes with a scale and a minimum per group of `GROUP` inputs."""
    codes, scale, low = int4_codes(weight)
    return (codes * scale + low).view_as(weight)


def int4_codes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 15 [out, groups, size] of a weight [out, in], in float32, and each group's scale and minimum [out, groups, 1]."""
    groups = _groups(weight, GROUP)
    low = groups.amin(dim=-1, keepdim=True)
    scale = ((groups.amax(dim=-1, keepdim=True) - low) / 15).clamp_min(torch.finfo(torch.float32).tiny)
    return ((groups - low) / scale).round(), scale, low


def nf4(weight: Tensor) -> Tensor:
    """NormalFloat4 codes with one scale (the largest magnitude) per block of `BLOCK` inputs."""
    blocks = _groups(weight, BLOCK)
    scale = blocks.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    between = (NF4[1:] + NF4[:-1]) / 2
    return (NF4[torch.bucketize(blocks / scale, between)] * scale).view_as(weight)


def _groups(weight: Tensor, size: int) -> Tensor:
    """weight [out, in] as [out, in / size, size]; a row that does not divide is one group."""
    size = size if weight.shape[1] % size == 0 else weight.shape[1]
    return weight.reshape(weight.shape[0], -1, size)


FLOAT_INPUTS: dict[str, Callable[[Tensor], Tensor]] = {"bf16": bf16, "int4": int4, "nf4": nf4, "bnb-nf4": nf4}
"""Schemes that round weights alone. bnb-nf4 is nf4, run by bitsandbytes."""
CALIBRATED = ("int8", "bnb-int8")
"""Schemes that need to know how large inputs get."""
SCHEMES = ("bf16", "int8", "int4", "nf4", "bnb-int8", "bnb-nf4")
SAME_INPUT = ("self_attn.q self_attn.k self_attn.v", "self_attn.o", "mlp.gate mlp.up", "mlp.down")


def check_scheme(scheme: str) -> str:
    """Return ``scheme`` if there is such a one, else raise ValueError naming those there are."""
    if scheme not in (FULL, *SCHEMES):
        raise ValueError(f"decode scheme: got {scheme!r}, expected one of {', '.join((FULL, *SCHEMES))}")
    return scheme


def quantise(tensors: dict[str, Tensor], scheme: str, ranges: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A checkpoint's tensors with its linear layers' weights as ``scheme`` has them, in float32; the rest as it is.

    ranges: of the layers' inputs (`sun.model.calibration`), which `CALIBRATED` schemes need. They add the tensors
    "...self_attn.q_proj.columns" and so on [in]: for int8 what smooths them, for bnb-int8 True where they have outliers.
    A head that is tied to the embedding becomes a tensor of its own, because the embedding stays as it is.
    """
    if check_scheme(scheme) == FULL:
        return tensors
    made = dict(tensors)
    made["lm_head.weight"] = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    for group in groups(tensors):
        weights, columns = [made[f"{layer}.weight"].float() for layer in group], None
        if scheme == "int8" and group[0] not in edges(tensors):
            columns = smoothing(weights, ranges[group[0].removeprefix("model.")])
        if scheme == "bnb-int8" and group[0] != HEAD:
            columns = ranges[group[0].removeprefix("model.")] >= OUTLIER
        if columns is not None:
            made |= {f"{layer}.columns": columns for layer in group}
        codes = codes_for(scheme, group[0], columns)
        for layer, weight in zip(group, weights, strict=True):
            made[f"{layer}.weight"] = codes.weight(weight) if codes else FLOAT_INPUTS[scheme](weight)
    return made


def groups(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Names of the linear layers of a checkpoint, those with the same input together."""
    return [[f"model.layers.{i}.{name}_proj" for name in group.split()] for i in range(layer_count(tensors)) for group in SAME_INPUT] + [[HEAD]]


def edges(tensors: dict[str, Tensor]) -> set[str]:
    """The layers whose inputs have the largest outliers: the head, and the MLP's last one in the first and the last two blocks.

    Found by measurement, one layer at a time: each of these loses more than any other does.
    """
    last = layer_count(tensors) - 1
    return {HEAD} | {f"model.layers.{i}.mlp.down_proj" for i in (0, last - 1, last)}


def layer_count(tensors: dict[str, Tensor]) -> int:
    """Decoder layers of a checkpoint."""
    return 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
