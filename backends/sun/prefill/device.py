"""A task's prefill module on a device, in its own number format: what K and V depend on, and the rest of the last layer where its states are wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sun.model.llama import Attend, Llama, Rotary, rotate
from sun.model.weights import Linear, joined

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Scheme -> what a module's linear layers, its attention and its K and V are in."""


@dataclass(frozen=True)
class DeviceLayer:
    """One layer; linear layers of one input are one. Norms are float32."""

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    norm_in: Tensor
    norm_mlp: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(frozen=True)
class LastLayer:
    """The last one in two parts: K and V, which every token needs, and the rest, which a whole prompt's last token does."""

    kv: Linear
    norm_in: Tensor
    k_norm: Tensor | None
    rest: LastRest | None = None


@dataclass(frozen=True)
class LastRest:
    """What a token's state after the last layer takes besides K and V."""

    q: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    norm_mlp: Tensor
    q_norm: Tensor | None


class DeviceModule:
    """Weights on a device. What passes from layer to layer, norms and rotations are float32; the rest is in ``dtype``.

    base: its sizes (`sun.model.manifest.BaseManifest`, or a `sun.model.shape.Shape`). embedding: decides the device and the dtype.
    states: whether it has what `end` takes.
    """

    def __init__(self, base, embedding: Tensor, layers: list[DeviceLayer], last: LastLayer):
        self.base, self.geometry, self.heads = base, base.geometry, base.heads
        self.embedding, self.layers, self.last = embedding, layers, last
        self.device, self.dtype, self.states = embedding.device, embedding.dtype, last.rest is not None
        self.rotary = Rotary(base.geometry.rope, self.device)

    @classmethod
    def of_model(cls, model: Llama, dtype: torch.dtype, device: torch.device, states: bool = False) -> DeviceModule:
        """A copy of a float32 model's weights, layer by layer: adapters are merged on the device and the sum is rounded, once. states: `end` is wanted."""
        def group(*linears: Linear) -> Linear:
            whole = joined(linears, device)
            return Linear(whole.weight.to(dtype), None if whole.bias is None else whole.bias.to(dtype))

        def norm(weight: Tensor | None) -> Tensor | None:
            return None if weight is None else weight.to(device)

        layers = [
            DeviceLayer(group(of.q, of.k, of.v), group(of.o), group(of.gate, of.up), group(of.down), norm(of.norm_in), norm(of.norm_mlp),
                        norm(of.q_norm), norm(of.k_norm)) for of in model.layers[:-1]]
        last = model.layers[-1]
        rest = LastRest(group(last.q), group(last.o), group(last.gate, last.up), group(last.down), norm(last.norm_mlp), norm(last.q_norm)) if states else None
        return cls(model.base, model.embedding.to(device, dtype), layers, LastLayer(group(last.k, last.v), norm(last.norm_in), norm(last.k_norm), rest))

    def fill(self, ids: Tensor, positions: Tensor, attend: Attend, keep: Callable[[int, Tensor, Tensor], None]) -> Tensor:
        """See `sun.model.llama.Llama.fill`; all tensors are the device's."""
        x, cos, sin = self.embedding[ids].float(), *self.rotary(positions)
        kv_heads = self.geometry.kv_heads
        for index, layer in enumerate(self.layers):
            q, k, v = self._heads(layer.qkv, self._norm(x, layer.norm_in)).split((self.heads, kv_heads, kv_heads), dim=1)
            mixed = attend(index, self._rotated(q, layer.q_norm, cos, sin), self._rotated(k, layer.k_norm, cos, sin), v)
            x = self._mixed(layer, x, mixed)
        k, v = self._heads(self.last.kv, self._norm(x, self.last.norm_in)).chunk(2, dim=1)
        keep(len(self.layers), self._rotated(k, self.last.k_norm, cos, sin), v)
        return x

    def end(self, x: Tensor, positions: Tensor, look: Callable[[Tensor], Tensor]) -> Tensor:
        """See `sun.model.llama.Llama.end`; float32."""
        rest = self.last.rest
        assert rest is not None, "made without `states`"
        q = self._heads(rest.q, self._norm(x, self.last.norm_in))
        return self._mixed(rest, x, look(self._rotated(q, rest.q_norm, *self.rotary(positions))))

    def _mixed(self, layer: DeviceLayer | LastRest, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + layer.o(mixed)
        gate, up = layer.gate_up(self._norm(x, layer.norm_mlp)).chunk(2, dim=-1)
        return x + layer.down(F.silu(gate) * up)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.base.norm_eps).to(self.dtype)

    def _heads(self, linear: Linear, h: Tensor) -> Tensor:
        return linear(h).unflatten(-1, (-1, self.geometry.head_dim))

    def _rotated(self, x: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.float()
        if norm is not None:
            x = F.rms_norm(x, (x.shape[-1],), norm, self.base.norm_eps)
        return rotate(x, cos, sin).to(self.dtype)
