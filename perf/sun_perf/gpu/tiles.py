"""Low-bit layers cut in other ways than `sun.decode.cuda.linear_kernel.tile_for` does: what tuning could still gain."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import torch
from triton.runtime.errors import OutOfResources

from sun.decode.cuda.formats import Dense, Int4, Int8, as_taken
from sun.decode.cuda.linear_kernel import MOST_SPLITS, PIECE, PIECES, Tile, rows_for
from sun.decode.cuda.table import pack
from sun_perf.gpu.books import Piece
from sun_perf.gpu.clock import captured, device_ms
from sun_perf.gpu.plan import Plan

CACHE = 200 << 20
"""Bytes of a layer's copies that take turns: far more than a cache holds, as in a whole model."""


def candidates(default: Tile, inputs: int, bits: int) -> list[Tile]:
    """The default tile and others."""
    others = [
        Tile(width, splits, warps, stages, unroll) for width, warps in ((64, 2), (128, 4), (128, 8), (256, 8)) for splits in (1, 2, 4, MOST_SPLITS)
        for stages, unroll in ((3, 1), (4, 1), (3, 2)) if inputs % (splits * unroll * PIECES[bits] * PIECE) == 0]
    return list(dict.fromkeys([default, *others]))


def copies(layer: Dense | Int8 | Int4, plan: Plan) -> list:
    """The layer, and others with the same weights elsewhere in memory."""
    made = [layer]
    for _ in range(CACHE // layer.nbytes if plan.device.type == "cuda" else 0):
        made.append(copy.copy(layer))
        name = "weight" if isinstance(layer, Dense) else "codes"
        setattr(made[-1], name, getattr(layer, name).clone())
    return made


def tiles(plan: Plan, scheme: str) -> Iterator[Piece]:
    """A row a layer of the timed shape and number of rows: us of bf16's, of the default tile and of the fastest one."""
    for name in plan.shape.linears:
        yield name, partial(rows, plan, scheme, name)


def rows(plan: Plan, scheme: str, name: str) -> Iterator[dict]:
    """One layer's."""
    outputs, inputs = plan.shape.linears[name]
    weight = torch.randn(outputs, inputs, device=plan.device, dtype=torch.bfloat16)
    layers, dense = copies(pack(weight, scheme, torch.bfloat16), plan), copies(pack(weight, "bf16", torch.bfloat16), plan)
    for batch in plan.tile_rows:
        size = rows_for(batch)
        default = layers[0].tiles[size]

        def us(layers: list, tile: Tile | None = None, size: int = size, batch: int = batch) -> float:
            x = as_taken(torch.randn(batch, inputs, device=plan.device), layers[0])

            def run() -> None:
                for layer in layers:
                    if tile:
                        layer.tiles = {**layer.tiles, size: tile}
                    layer(x)

            return device_ms(captured(run, plan.device), plan.device, plan.times) / len(layers) * 1e3

        # The default one first, so that it is there even if there is no time for more.
        times = {default: us(layers, default)}
        for tile in candidates(default, inputs, layers[0].bits)[: None if plan.device.type == "cuda" else 2]:
            if plan.left_s > 0 and tile != default:
                with suppress(OutOfResources):  # more shared memory than there is
                    times[tile] = us(layers, tile)
        best = min(times, key=times.__getitem__)
        yield {
            "scheme": scheme, "layer": name, "outputs": outputs, "inputs": inputs, "rows": batch, "bf16_us": round(us(dense), 1),
            "default": str(default), "default_us": round(times[default], 1), "best": str(best), "best_us": round(times[best], 1), "tried": len(times)}
