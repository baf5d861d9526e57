"""A Llama-architecture decoder over ragged tokens, with attention left to the caller.

Prefill and decode differ only in where K and V live and what a token may attend to, so both pass their own
``attend``. Covers Llama, Mistral (without a sliding window), Qwen2 (biases) and Qwen3 (norms on Q and K).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sun.model.quantise import FULL, HEAD, codes_for
from sun.model.weights import Linear, as_float32

if TYPE_CHECKING:
    from sun.model.manifest import BaseManifest, Rope

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q [T, heads, head_dim], k and v [T, kv_heads, head_dim]) -> [T, heads * head_dim]."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding to x [T, heads, head_dim] with cos, sin [T, 1, head_dim] (RoFormer, arXiv 2104.09864; halves rotated as in Llama)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class Rotary:
    """The angles of a rotary embedding: cos and sin [T, 1, head_dim] of positions [T] (int64)."""

    def __init__(self, rope: Rope, device: torch.device | str = "cpu"):
        self.inv_freq, self.scale = torch.tensor(rope.inv_freq, dtype=torch.float32, device=device), rope.scale

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.outer(positions.float(), self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos() * self.scale, angles.sin() * self.scale


class Layer:
    """One decoder layer's weights."""

    def __init__(self, prefix: str, tensors: dict[str, Tensor], lora: dict[str, tuple[Tensor, Tensor]], scheme: str):
        def linear(name: str) -> Linear:
            bias = tensors.get(f"model.{prefix}.{name}.bias")
            weight = as_float32(tensors[f"model.{prefix}.{name}.weight"])
            codes = codes_for(scheme, name, tensors.get(f"model.{prefix}.{name}.columns"))
            return Linear(weight, None if bias is None else as_float32(bias), lora.get(f"{prefix}.{name}"), codes)

        def norm(name: str) -> Tensor | None:
            weight = tensors.get(f"model.{prefix}.{name}.weight")
            return None if weight is None else as_float32(weight)

        self.q, self.k, self.v, self.o = (linear(f"self_attn.{n}_proj") for n in "qkvo")
        self.gate, self.up, self.down = (linear(f"mlp.{n}_proj") for n in ("gate", "up", "down"))
        self.norm_in, self.norm_mlp = norm("input_layernorm"), norm("post_attention_layernorm")
        self.q_norm, self.k_norm = norm("self_attn.q_norm"), norm("self_attn.k_norm")


class Llama:
    """The decoder's weights and its forward pass in float32.

    tensors: checkpoint tensors by their transformers names. lora: adapters by layer name (see `load_lora`).
    scheme: what `tensors` went through (see `sun.model.quantise`); some round a layer's inputs, too.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, base: BaseManifest, tensors: dict[str, Tensor], lora: dict[str, tuple[Tensor, Tensor]] | None = None,
                 scheme: str = FULL):
        self.base, self.scheme = base, scheme
        self.heads, self.geometry = base.heads, base.geometry
        self.embedding = as_float32(tensors["model.embed_tokens.weight"])
        self.layers = [Layer(f"layers.{i}", tensors, lora or {}, scheme) for i in range(base.geometry.layers)]
        self.final_norm = as_float32(tensors["model.norm.weight"])
        head = as_float32(tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]))
        self.head = Linear(head, codes=codes_for(scheme, HEAD))
        unknown = set(lora or {}) - {f"layers.{i}.{n}" for i in range(base.geometry.layers) for n in LINEARS}
        if unknown:
            raise ValueError(f"adapter names layers that the base does not have: {', '.join(sorted(unknown)[:3])}")
        self.rotary = Rotary(base.geometry.rope)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension (arXiv 1910.07467)."""
        return F.rms_norm(x, (x.shape[-1],), weight, self.base.norm_eps)

    def hidden(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run all layers on tokens ids [T] at positions [T] (int64); returns hidden states [T, hidden]."""
        x, cos, sin = self.embedding[ids], *self.rotary(positions)
        for index, layer in enumerate(self.layers):
            x = self._layer(index, layer, x, cos, sin, attend)
        return x

    def fill(self, ids: Tensor, positions: Tensor, attend: Attend, keep: Callable[[int, Tensor, Tensor], None]) -> Tensor:
        """Run only what K and V depend on: all layers but the last, whose K and V go to keep(layer, k, v) and end the pass. Returns its inputs [T, hidden]."""
        x, cos, sin = self.embedding[ids], *self.rotary(positions)
        for index, layer in enumerate(self.layers[:-1]):
            x = self._layer(index, layer, x, cos, sin, attend)
        last = self.layers[-1]
        h = self.norm(x, last.norm_in)
        keep(len(self.layers) - 1, rotate(self._heads(last.k, h, last.k_norm), cos, sin), self._heads(last.v, h))
        return x

    def end(self, x: Tensor, positions: Tensor, look: Callable[[Tensor], Tensor]) -> Tensor:
        """Hidden states [T, hidden] of some of the tokens whose last layer `fill` has left out, from its inputs x [T, hidden] of them at positions [T].

        look(q [T, heads, head_dim]) -> [T, heads * head_dim] attends to what `fill` has kept of the last layer.
        """
        last = self.layers[-1]
        q = self._heads(last.q, self.norm(x, last.norm_in), last.q_norm)
        return self._mixed(last, x, look(rotate(q, *self.rotary(positions))))

    def _layer(self, index: int, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        h = self.norm(x, layer.norm_in)
        q = rotate(self._heads(layer.q, h, layer.q_norm), cos, sin)
        k = rotate(self._heads(layer.k, h, layer.k_norm), cos, sin)
        return self._mixed(layer, x, attend(index, q, k, self._heads(layer.v, h)))

    def _mixed(self, layer: Layer, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + layer.o(mixed)
        h = self.norm(x, layer.norm_mlp)
        return x + layer.down(F.silu(layer.gate(h)) * layer.up(h))

    def _heads(self, linear: Linear, h: Tensor, norm: Tensor | None = None) -> Tensor:
        x = linear(h).unflatten(-1, (-1, self.geometry.head_dim))
        return x if norm is None else self.norm(x, norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [T, vocab] of hidden states [T, hidden]."""
        return self.head(self.norm(hidden, self.final_norm))


LINEARS = tuple(f"self_attn.{n}_proj" for n in "qkvo") + tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))
