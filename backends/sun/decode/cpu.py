"""The decode step on CPUs: packed linear layers, and compiled kernels for everything between them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from sun.decode import kernels
from sun.decode.compiling import first_run
from sun.decode.kv_pool import KVPool, Slot
from sun.decode.packed import Packed, pack
from sun.model.llama import Llama
from sun.model.weights import Linear


class Fused:
    """Linear layers of one input as one; alone: one thread runs it. Biases and what smooths the input are apart: kernels apply them."""

    def __init__(self, layers: list[Linear], scheme: str, alone: bool):
        weight, codes = torch.cat([layer.weight for layer in layers]), layers[0].codes
        self.packed: Packed = pack(weight, scheme, codes, alone)
        biases = [torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
        self.bias: np.ndarray = torch.cat(biases).numpy()
        smooth = codes.smooth if codes and codes.smooth is not None else torch.ones(weight.shape[1])
        self.divided: np.ndarray = (1 / smooth).numpy()

    @property
    def form(self) -> int:
        """How this layer takes its input, see `sun.decode.kernels`."""
        return self.packed.form


class Inputs:
    """Preallocated inputs of a layer of ``width`` columns, for batches up to the largest seen."""

    def __init__(self, width: int, form: int):
        self._width, self._copies, self._most = width, 2 if form == kernels.SPLIT else 1, 0

    def take(self, batch: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """x [rows, width] for torch, the same for kernels, and scale [batch], ones."""
        if batch > self._most:
            self._most = batch
            self._x, self._scale = torch.zeros(batch * self._copies, self._width), np.ones(batch, np.float32)
        x = self._x[: batch * self._copies]
        return x, x.numpy(), self._scale[:batch]


class CpuExecutor:
    """A decode step with weights packed by the model's scheme: a private copy, so the model itself can be let go.

    threads: over which a batch's sequences are spread between linear layers; torch's own number of threads is the
    caller's. A first step is taken here, because it may compile the kernels.
    """

    def __init__(self, model: Llama, pool: KVPool, threads: int = 1):
        self.eps = np.float32(model.base.norm_eps)
        self.rotary, self.embedding, self.vocab = model.rotary, model.embedding, model.base.vocab
        self._kv = [layer.numpy() for layer in pool.data]
        none = np.empty(0, np.float32)
        self._layers = []
        for layer in model.layers:
            groups = ([layer.q, layer.k, layer.v], [layer.o], [layer.gate, layer.up], [layer.down])
            qkv, o, gate_up, down = (Fused(group, model.scheme, threads == 1) for group in groups)
            # Smoothing is a factor per column, and so is a norm's weight.
            norms = [layer.norm_in.numpy() * qkv.divided, layer.norm_mlp.numpy() * gate_up.divided]
            norms += [none if norm is None else norm.numpy() for norm in (layer.q_norm, layer.k_norm)]
            self._layers.append((qkv, o, gate_up, down, *norms))
        self._norm, self._head = model.final_norm.numpy(), Fused([model.head], model.scheme, threads == 1)
        qkv, o, _, down = self._layers[0][:4]
        hidden = model.base.hidden
        self._hidden = Inputs(hidden, qkv.form)
        self._mixed = Inputs(model.heads * model.geometry.head_dim, o.form)
        self._product = Inputs(model.layers[0].down.weight.shape[1], down.form)
        self._final = Inputs(hidden, self._head.form)
        self._crew = ThreadPoolExecutor(threads - 1, thread_name_prefix="decode-step") if threads > 1 else None
        self._threads = threads
        spare = pool.take(1)
        first_run(lambda: self.step([0], [0], [spare]))
        pool.give_back(spare)

    @torch.inference_mode()
    def step(self, tokens: list[int], positions: list[int], slots: list[Slot]) -> Tensor:
        """See `sun.decode.executor.Executor.step`."""
        batch = len(tokens)
        starts, places = np.array([slot.start for slot in slots]), np.array(positions)
        # Rows of one slot read each other's K and V: in order, so by one thread.
        each, eps = self._each(batch, together=len(np.unique(starts)) < batch), self.eps
        cos, sin = (part.squeeze(1).numpy() for part in self.rotary(torch.from_numpy(places)))
        x = self.embedding[torch.tensor(tokens)].numpy()
        hidden, mixed, product = (inputs.take(batch) for inputs in (self._hidden, self._mixed, self._product))
        y, y_scale, bias = self._nothing(batch)
        for kv, (qkv, o, gate_up, down, norm_in, norm_mlp, q_norm, k_norm) in zip(self._kv, self._layers, strict=True):
            each(kernels.add_norm, x, y, y_scale, bias, norm_in, eps, qkv.form, *hidden[1:])
            y = qkv.packed(hidden[0]).numpy()
            each(kernels.attention, y, hidden[2], qkv.bias, q_norm, k_norm, eps, cos, sin, starts, places, kv, o.divided, o.form, *mixed[1:])
            y = o.packed(mixed[0]).numpy()
            each(kernels.add_norm, x, y, mixed[2], o.bias, norm_mlp, eps, gate_up.form, *hidden[1:])
            y = gate_up.packed(hidden[0]).numpy()
            each(kernels.silu_product, y, hidden[2], gate_up.bias, down.divided, down.form, *product[1:])
            y, y_scale, bias = down.packed(product[0]).numpy(), product[2], down.bias
        return self._logits(each, x, y, y_scale, bias)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `sun.decode.executor.Executor.logits`."""
        # Copied, because the kernel writes to it.
        return self._logits(self._each(len(hidden), together=False), hidden.clone().numpy(), *self._nothing(len(hidden)))

    def _logits(self, each: Callable[..., None], x: np.ndarray, y: np.ndarray, y_scale: np.ndarray, bias: np.ndarray) -> Tensor:
        """Norm and head on x plus what the last layer adds to it."""
        batch = len(x)
        final = self._final.take(batch)
        each(kernels.add_norm, x, y, y_scale, bias, self._norm, self.eps, self._head.form, *final[1:])
        logits = self._head.packed(final[0])
        if self._head.form == kernels.PLAIN:
            return logits
        out = torch.empty(batch, self.vocab)
        each(kernels.logits, logits.numpy(), final[2], self._head.bias, out.numpy())
        return out

    def _nothing(self, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is added to a batch's states before the first layer: y, y_scale and bias of `sun.decode.kernels.add_norm`."""
        return np.empty((0, 0), np.float32), self._product.take(batch)[2], self._norm

    def _each(self, batch: int, together: bool) -> Callable[..., None]:
        """Runs a kernel over the batch's rows, by all threads; by this one alone if the rows need each other (``together``)."""
        if self._crew is None or batch == 1 or together:
            return lambda kernel, *arguments: kernel(0, batch, *arguments)
        share = -(-batch // self._threads)
        spans = [(first, min(first + share, batch)) for first in range(0, batch, share)]

        def run(kernel: Callable, *arguments) -> None:
            others = [self._crew.submit(kernel, *span, *arguments) for span in spans[1:]]
            kernel(*spans[0], *arguments)
            for other in others:
                other.result()

        return run
