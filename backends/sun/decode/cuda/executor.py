"""The decode step on a CUDA device: kernels in Triton language, one captured graph per size of batch."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from sun.decode.cuda import layer_kernels as kernels
from sun.decode.cuda.attention import Attention
from sun.decode.cuda.decoder import Decoder, Group
from sun.decode.kv_pool import KVPool, Slot

PRODUCT_BLOCK = 1024
"""Columns of the MLP's product that a program takes."""


class CudaExecutor:
    """Runs batches of up to ``most`` rows (rounded up to a power of two), padded to the next power of two.

    Padding writes to the pool's spare token. Rows share nothing but matrix products, so within one size of batch a row's
    bits do not depend on its neighbours; between sizes they may, because products are cut differently. Logits stay on the
    device, and a step returns before it has run.

    graphs: replay captured CUDA graphs; without, and on the CPU under Triton's interpreter, the same kernels run one by one.
    """

    def __init__(self, decoder: Decoder, pool: KVPool, most: int = 64, graphs: bool = True):
        if not pool.spare:
            raise ValueError("pool: needs a spare token, to which padded rows write")
        self.decoder, self.pool, self.most = decoder, pool, triton.next_power_of_2(most)
        geometry = decoder.geometry
        self.attention = Attention(decoder.heads, geometry.kv_heads, geometry.head_dim, self.most, pool.budget, decoder.device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        if graphs and decoder.device.type == "cuda":
            self._capture()

    def step(self, tokens: list[int], positions: list[int], slots: list[Slot]) -> Tensor:
        """See `sun.decode.executor.Executor.step`; the logits are the device's and hold until the next step. Raises ValueError for too many rows."""
        batch = len(tokens)
        if batch > self.most:
            raise ValueError(f"tokens: {batch} rows, this executor takes at most {self.most}")
        size = triton.next_power_of_2(batch)
        rows = torch.zeros(3, size, dtype=torch.int64)
        rows[2] = self.pool.budget
        rows[:, :batch] = torch.tensor([tokens, positions, [slot.start for slot in slots]])
        with self._here(), torch.inference_mode():
            if size not in self._graphs:
                return self._forward(rows.to(self.decoder.device))[:batch]
            graph, given, logits = self._graphs[size]
            # Pinned memory goes back to its pool only when this copy has run, so that a step need not wait for the last one.
            given.copy_(rows.pin_memory(), non_blocking=True)
            graph.replay()
            return logits[:batch]

    def logits(self, hidden: Tensor) -> Tensor:
        """See `sun.decode.executor.Executor.logits`."""
        rows = torch.zeros(triton.next_power_of_2(len(hidden)), hidden.shape[1])
        rows[: len(hidden)] = hidden
        with self._here(), torch.inference_mode():
            return self._logits(rows.to(self.decoder.device), None, None)[: len(hidden)]

    def _here(self):
        """The device as this thread's current one: Triton launches there."""
        return torch.cuda.device(self.decoder.device) if self.decoder.device.type == "cuda" else nullcontext()

    @torch.inference_mode()
    def _capture(self) -> None:
        pool = None
        with self._here():
            for size in [1 << i for i in range(self.most.bit_length())]:
                given = torch.zeros(3, size, dtype=torch.int64, device=self.decoder.device)
                given[2] = self.pool.budget
                # Compiles what is new, which a capture must not, and a request should not wait for.
                self._forward(given)
                self.logits(torch.zeros(size, self.decoder.hidden))
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    logits = self._forward(given)
                pool = pool or graph.pool()
                self._graphs[size] = graph, given, logits

    def _forward(self, rows: Tensor) -> Tensor:
        """Logits [size, vocab] float32 of rows [3, size]: tokens, positions, starts."""
        tokens, positions, starts = rows
        decoder = self.decoder
        cos, sin = (part.squeeze(1) for part in decoder.rotary(positions))
        x = decoder.embedding[tokens].float()
        parts, last = None, None
        for layer, kv in zip(decoder.layers, self.pool.data, strict=True):
            h = self._add_norm(x, parts, last, layer.norm_in, layer.qkv)
            q = self._rotate_and_keep(layer.qkv.format(h), layer.qkv, layer.norms, cos, sin, starts, positions, kv)
            mixed = self.attention(q, kv, starts, positions, layer.o.format.columns, layer.o.format.takes)
            h = self._add_norm(x, layer.o.format(mixed), layer.o, layer.norm_mlp, layer.gate_up)
            parts, last = layer.down.format(self._product(layer.gate_up.format(h), layer.gate_up, layer.down)), layer.down
        return self._logits(x, parts, last)

    def _logits(self, x: Tensor, parts: Tensor | None, last: Group | None) -> Tensor:
        decoder = self.decoder
        logits = decoder.head.format(self._add_norm(x, parts, last, decoder.norm, decoder.head))
        return logits.view(len(x), -1).float() if len(logits) == 1 else logits.sum(0)

    def _add_norm(self, x: Tensor, parts: Tensor | None, group: Group | None, weight: Tensor, to: Group) -> Tensor:
        batch, width = x.shape
        out = torch.empty(batch, width, dtype=to.format.takes, device=x.device)
        bias = None if group is None else group.bias
        kernels.add_norm[(batch,)](
            x, parts, bias, weight, out, self.decoder.norm_eps, batch, width, PARTS=0 if parts is None else len(parts), BIAS=bias is not None,
            BLOCK=triton.next_power_of_2(width), num_warps=8)
        return out

    def _rotate_and_keep(self, parts: Tensor, group: Group, norms: Tensor | None, cos: Tensor, sin: Tensor, starts: Tensor, positions: Tensor, kv: Tensor) -> Tensor:
        batch, heads, kv_heads, size = len(starts), self.decoder.heads, kv.shape[1], kv.shape[3]
        q = torch.empty(batch, heads, size, dtype=self.decoder.dtype, device=kv.device)
        kernels.rotate_and_keep[batch, heads + 2 * kv_heads](
            parts, group.bias, norms, cos, sin, starts, positions, q, kv, self.decoder.norm_eps, batch, kv.shape[2],
            HEADS=heads, KV_HEADS=kv_heads, SIZE=size, HALF=triton.next_power_of_2(size // 2), PARTS=len(parts), BIAS=group.bias is not None,
            NORMED=norms is not None, num_warps=1)
        return q

    def _product(self, parts: Tensor, group: Group, to: Group) -> Tensor:
        batch, width = parts.shape[1], parts.shape[2] // 2
        out, columns = torch.empty(batch, width, dtype=to.format.takes, device=parts.device), to.format.columns
        kernels.silu_product[batch, triton.cdiv(width, PRODUCT_BLOCK)](
            parts, group.bias, columns, out, batch, width, PARTS=len(parts), BIAS=group.bias is not None, COLUMNS=columns is not None,
            BLOCK=PRODUCT_BLOCK, num_warps=4)
        return out
