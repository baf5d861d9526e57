"""What a tuning run depends on besides the base and the data."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields

from sun.model.quantise import FULL, check_scheme

METHODS = ("sun", "full")
ADAPTERS = ("lora", "none")
SCHEDULES = ("linear", "cosine")
PRECISIONS = ("fp32", "bf16")
MANY = 16
"""Examples a step, from which on rates stay as they are."""
RATES = {("sun", "lora"): (2e-3, 1.0), ("full", "lora"): (2e-3, 1.0), ("sun", "none"): (1e-3, 2 / 3), ("full", "none"): (4e-4, 0.0)}
"""Peak learning rate at `MANY` examples a step, and the power of (examples / MANY) that it is times at fewer, by method and adapter.

What was measured at 16 and at 4 on banking and math (perf/accuracy.md): an adapter wants 2e-3 and 5e-4, all weights of a prefill module 1e-3 and
4e-4, and full fine-tuning had 4e-4 at both, where half of it was no worse. Full fine-tuning's adapter was not measured.
"""
RANK = 64
"""An adapter's, unless said otherwise: the highest that was measured learns fastest (perf/accuracy.md)."""


def fast_precision() -> str:
    """One of `PRECISIONS`: bf16 where this machine multiplies in it natively (a GPU, AMX, AVX-512 BF16), else fp32."""
    import torch

    cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if cpu or torch.cuda.is_available() else "fp32"


def devices() -> int:
    """How many devices the run is on, one process each; a step takes a batch (or as many as it accumulates) on each of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class TuneSettings:
    """One run's settings; kept beside what it makes.

    method: "sun" trains the prefill module through the frozen decode module, "full" one ordinary model.
    whole_prompt: the prefill module runs all of the prompt, and the first token is chosen from what it makes of the last token.
    adapter: "lora", or "none" for all weights. decode: the frozen decode module's scheme (see `sun.model.quantise`).
    steps: optimiser steps, each of batch x accumulate examples. lr: peak learning rate, None for `RATES`'s.
    kv_lr: factor on the learning rate of the K and V projections, whose outputs are what is handed over.
    dropout: share of an adapter's inputs that are left out of a step, at random (peft's lora_dropout).
    export_rank: rank that a trained adapter is cut down to (see `sun_build.tune.shrink`), None for its own.
    schedule: of the learning rate after `warmup` (a share of the steps). clip: largest norm of the gradient.
    max_tokens: longest example, prompt and response. distill: share of the loss that is the divergence from a teacher's
    distribution over the response tokens. eval_every, save_every: steps. patience: evaluations without a better held-out
    loss after which the run ends, 0 for never. checkpointing: recompute the prefill's activations, to save memory.
    precision: of the matrix products; weights, gradients and the optimiser stay in float32.
    """

    method: str = "sun"
    whole_prompt: bool = False
    adapter: str = "lora"
    decode: str = FULL
    steps: int = 300
    batch: int = 16
    accumulate: int = 1
    rank: int = RANK
    alpha: int = 2 * RANK
    dropout: float = 0.0
    export_rank: int | None = None
    lr: float | None = None
    kv_lr: float = 1.0
    schedule: str = "linear"
    warmup: float = 0.06
    clip: float = 1.0
    max_tokens: int = 512
    distill: float = 0.0
    eval_every: int = 50
    save_every: int = 50
    patience: int = 0
    checkpointing: bool = False
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("adapter", ADAPTERS), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(known)}")
        check_scheme(self.decode)
        if self.method == "full" and self.decode != FULL:
            raise ValueError(f"decode: {self.decode} is for method sun; with method full no module is frozen")
        if self.method == "full" and self.whole_prompt:
            raise ValueError("whole_prompt: is for method sun; with method full one module runs all tokens")
        for name in ("steps", "batch", "accumulate", "rank", "alpha", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, the least is 1")
        if self.export_rank is not None and (self.method, self.adapter) != ("sun", "lora"):
            raise ValueError(f"export_rank: is for an adapter of method sun; method {self.method} with adapter {self.adapter} writes whole weights")
        if self.export_rank is not None and not 1 <= self.export_rank <= self.rank:
            raise ValueError(f"export_rank: got {self.export_rank}, expected 1 to the rank, {self.rank}")
        if self.lr is not None and not 0 <= self.lr < math.inf:
            raise ValueError(f"lr: got {self.lr}, expected a rate of 0 or more")
        if not 0 < self.kv_lr < math.inf:
            raise ValueError(f"kv_lr: got {self.kv_lr}, expected a factor above 0")
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill: got {self.distill}, expected 0 to 1")
        for name, of in (("warmup", "the steps"), ("dropout", "an adapter's inputs")):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a share of {of} from 0 to below 1")
        if self.dropout and self.adapter != "lora":
            raise ValueError(f"dropout: is for adapter lora; with adapter {self.adapter} nothing is left out")

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up; `RATES`'s is for a step's examples on all devices."""
        if self.lr is not None:
            return self.lr
        rate, power = RATES[self.method, self.adapter]
        return float(f"{rate * min(1, devices() * self.batch * self.accumulate / MANY) ** power:.2g}")

    def differences(self, other: TuneSettings) -> list[str]:
        """Names of settings that make another run than ``other``. The split of a step into batch x accumulate makes none, nor does an adapter's without one."""
        free = {"batch", "accumulate", "save_every", "checkpointing"}
        free |= {"rank", "alpha"} if self.adapter == other.adapter == "none" else set()
        names = [f.name for f in fields(self) if f.name not in free and getattr(self, f.name) != getattr(other, f.name)]
        if self.batch * self.accumulate != other.batch * other.accumulate:
            names.append("batch x accumulate")
        return names
