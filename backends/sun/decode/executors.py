"""Which executors and number formats this machine can run, and a worker's own made of its settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sun import gpu
from sun.decode.executor import REPLAY_ROWS, Executor
from sun.decode.kv_pool import KVPool
from sun.decode.sampling import Choice
from sun.decode.sequence import Sequence
from sun.model.loading import load_decode
from sun.model.manifest import BaseManifest
from sun.model.quantise import FULL, SCHEMES
from sun.slots import KV_TOKENS

EXECUTORS = {"cpu": (FULL, *SCHEMES), "cuda": ("fp32", "bf16", "int8", "int4", "fp8", "bnb-nf4")}
"""The schemes of each executor, whether or not they run on this machine. Those of cuda are `sun.decode.cuda.table.FORMATS`, which only imports with the triton package."""


@dataclass(frozen=True)
class Loaded:
    """What a `DecodeEngine` is made of. pick: how it chooses tokens from the executor's logits."""

    base: BaseManifest
    executor: Executor
    pool: KVPool
    pick: Callable[[Tensor, list[Sequence]], list[Choice]] | None = None


def check(executor: str, scheme: str) -> None:
    """Raise ValueError naming the field for an executor that there is not, or a scheme that it has not."""
    if executor not in EXECUTORS:
        raise ValueError(f"executor: got {executor!r}, expected one of {', '.join(EXECUTORS)}")
    if scheme not in EXECUTORS[executor]:
        raise ValueError(f"scheme: got {scheme!r}, executor {executor} has {', '.join(EXECUTORS[executor])}")


def why_not(executor: str) -> str | None:
    """What keeps an executor from running here; None if nothing does."""
    if executor == "cpu":
        return None
    return gpu.missing() or (gpu.compiler_missing() if importlib.util.find_spec("triton") else "the triton package is not installed")


def formats(executor: str) -> dict[str, str | None]:
    """Scheme -> what keeps it from running by this executor on this machine, or None. An executor that does not run has none."""
    if executor == "cpu":
        from sun.decode import packed  # compiles kernels when it is first imported

        return {scheme: packed.why_not(scheme) for scheme in (FULL, *SCHEMES)}
    if why_not(executor):
        return {}
    from sun.decode.cuda.table import FORMATS

    device = torch.device("cuda", torch.cuda.current_device())
    return {scheme: kind.missing(device) for scheme, kind in FORMATS.items()}


def load(executor: str, base_dir: str | Path, scheme: str, own: Path | None = None, kv_tokens: int = KV_TOKENS, max_batch: int = 64,
         threads: int = 1, device: str | None = None) -> Loaded:
    """A worker's executor and KV pool, of the base's weights or ``own``.

    device: that of `cuda`, such as "cuda:0"; "cpu" runs its kernels in Triton's interpreter. threads: of `cpu`.
    Raises ValueError for an executor or scheme that there is not, RuntimeError for one that does not run on this machine.
    """
    check(executor, scheme)
    if executor == "cpu":
        from sun.decode.cpu import CpuExecutor

        base, model = load_decode(base_dir, scheme, own)
        pool = KVPool(base.geometry, kv_tokens)
        return Loaded(base, CpuExecutor(model, pool, threads), pool)
    on = torch.device(device or "cuda")
    if on.type == "cuda" and (reason := why_not("cuda")):
        raise RuntimeError(f"executor: cuda does not run here: {reason}")
    from sun.decode.cuda.decoder import of_model, reference
    from sun.decode.cuda.executor import CudaExecutor
    from sun.decode.cuda.table import FORMATS, dtype_of
    from sun.decode.cuda.sampling import choose

    if reason := FORMATS[scheme].missing(on):
        raise RuntimeError(f"scheme: {scheme} does not run here: {reason}")
    base, model = load_decode(base_dir, reference(scheme), own)
    decoder = of_model(model, scheme, dtype_of(scheme), on)  # first, so that the pool's room is what weights leave
    pool = KVPool(base.geometry, kv_tokens, on, dtype_of(scheme), spare=1)
    return Loaded(base, CudaExecutor(decoder, pool, max(max_batch, REPLAY_ROWS)), pool, choose)
