"""What a run measures: the shape, batches, contexts. One for a GPU, and a tiny one that Triton's interpreter takes on a CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch

from sun.model.shape import Angles, Shape

TINY = Shape(
    layers=1, hidden=256, inner=256, heads=4, kv_heads=2, head_dim=64, vocab=96, norm_eps=1e-5, max_context=256,
    rope=Angles([1.0 / 100 ** (i / 32) for i in range(32)]), normed=True, biases=True)


def small_of(shape: Shape) -> Shape:
    """A model like ``shape`` whose logits plain torch computes on the CPU, too: with its heads, norms and biases, but fewer and narrower."""
    kv_heads = min(4, shape.kv_heads)
    return replace(shape, layers=4, hidden=1024, inner=2816, heads=shape.heads // shape.kv_heads * kv_heads, kv_heads=kv_heads, vocab=4096)


@dataclass(frozen=True)
class Plan:
    """small: of the models that are compared with plain torch. sequences: decoded at once by the systems that `tasks` compares.

    prompts: lengths whose KV is handed over. prefills: lengths that are prefilled, also in chunks of ``chunk`` tokens.
    layer_rows: of the layers that are checked, tile_rows: of those that are cut in other ways.
    times: runs a figure is the median of. buffer: bytes by which bandwidth is measured.
    """

    shape: Shape
    small: Shape
    device: torch.device
    schemes: tuple[str, ...]
    batches: tuple[int, ...]
    context: int
    tasks: tuple[int, ...]
    sequences: int
    prompts: tuple[int, ...]
    prefills: tuple[int, ...]
    chunk: int
    layer_rows: tuple[int, ...]
    tile_rows: tuple[int, ...]
    times: int
    buffer: int
    budget_s: float
    started: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        """Seconds left of the budget."""
        return self.budget_s - (time.monotonic() - self.started)


def for_gpu(shape: Shape, device: torch.device, schemes: tuple[str, ...], context: int, budget_s: float) -> Plan:
    """Minutes on one GPU."""
    return Plan(shape, small_of(shape), device, schemes, (1, 4, 8, 16, 32, 64), context, (2, 4, 8), 32, (128, 512, 2048), (128, 512, 2048, 8192), 512,
                (1, 16, 64), (16, 32, 64), 20, 4 << 30, budget_s)


def smoke(schemes: tuple[str, ...]) -> Plan:
    """Seconds in the interpreter: its times mean nothing."""
    return Plan(TINY, TINY, torch.device("cpu"), schemes, (2,), 5, (2,), 2, (4,), (9,), 4, (2,), (2, 17), 1, 1 << 20, 600.0)
