"""The decode module on a device, in a number format: layers that share an input are one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sun.decode.cuda.formats import Format
from sun.decode.cuda.table import head_scheme, pack
from sun.model.llama import Llama, Rotary
from sun.model.codes import Codes
from sun.model.quantise import FULL, HEAD, SCHEMES, codes_for
from sun.model.shape import Shape
from sun.model.weights import Linear, joined


@dataclass(frozen=True)
class Group:
    """Linear layers of one input as one."""

    format: Format
    bias: Tensor | None = None


def weighed(norm: Tensor, to: Group) -> Tensor:
    """A norm's weight times the columns of the layer behind it."""
    return norm if to.format.columns is None else norm * to.format.columns


@dataclass(frozen=True)
class DecoderLayer:
    """One layer. norm_in, norm_mlp: as the layer behind them takes what they make (`weighed`). norms [2, head_dim]: of Q and of K, or None."""

    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    norm_in: Tensor
    norm_mlp: Tensor
    norms: Tensor | None


class Decoder:
    """Weights and sizes of a decode module. dtype: of activations, K and V; norms and biases are float32."""

    def __init__(self, base, scheme: str, dtype: torch.dtype, embedding: Tensor, layers: list[DecoderLayer], norm: Tensor, head: Group):
        self.scheme, self.dtype, self.device = scheme, dtype, embedding.device
        self.geometry, self.heads, self.hidden, self.vocab = base.geometry, base.heads, base.hidden, base.vocab
        self.norm_eps, self.embedding, self.layers, self.norm, self.head = base.norm_eps, embedding, layers, norm, head
        self.rotary = Rotary(base.geometry.rope, self.device)

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step reads: all but the embedding."""
        groups = [group for layer in self.layers for group in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return sum(group.format.nbytes for group in (*groups, self.head))


def reference(scheme: str) -> str:
    """The scheme of `sun.model.quantise` whose numbers a format packs; formats that it does not know round the float32 weights."""
    return scheme if scheme in SCHEMES else FULL


def of_model(model: Llama, scheme: str, dtype: torch.dtype, device: torch.device) -> Decoder:
    """A copy of a model's weights (of ``reference(scheme)``) on ``device``, layer by layer."""
    def group(*linears: Linear, scheme: str = scheme) -> Group:
        whole = joined(linears, device)
        return Group(pack(whole.weight, scheme, dtype, linears[0].codes), whole.bias)

    def layer(of) -> DecoderLayer:
        norms = None if of.q_norm is None else torch.stack((of.q_norm, of.k_norm)).to(device)
        qkv, gate_up = group(of.q, of.k, of.v), group(of.gate, of.up)
        return DecoderLayer(
            qkv, group(of.o), gate_up, group(of.down), weighed(of.norm_in.to(device), qkv), weighed(of.norm_mlp.to(device), gate_up), norms)

    head = group(model.head, scheme=head_scheme(scheme))
    return Decoder(
        model.base, scheme, dtype, model.embedding.to(device, dtype), [layer(each) for each in model.layers], weighed(model.final_norm.to(device), head), head)


def dummy(shape: Shape, scheme: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Decoder:
    """Random weights of a shape, made on ``device`` and packed layer by layer: for timing. Answers mean nothing."""
    draw = torch.Generator(device).manual_seed(seed)
    wide = torch.float32 if dtype is torch.float32 else torch.bfloat16

    def weight(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, generator=draw, device=device, dtype=wide).mul_(inputs**-0.5)

    def codes(name: str) -> Codes | None:
        return codes_for(reference(scheme), name)

    def ones(size: int) -> Tensor:
        return torch.ones(size, device=device)

    def layer() -> DecoderLayer:
        groups = {}
        for name, size in shape.linears.items():
            bias = torch.randn(size[0], generator=draw, device=device) if shape.biases and name == "qkv" else None
            groups[name] = Group(pack(weight(*size), scheme, dtype, codes(name)), bias)
        return DecoderLayer(
            **groups, norm_in=weighed(ones(shape.hidden), groups["qkv"]), norm_mlp=weighed(ones(shape.hidden), groups["gate_up"]),
            norms=torch.ones(2, shape.head_dim, device=device) if shape.normed else None)

    embedding = weight(shape.vocab, shape.hidden).to(dtype)
    head = Group(pack(embedding if shape.tied else weight(shape.vocab, shape.hidden), head_scheme(scheme), dtype, codes(HEAD)))
    return Decoder(shape, scheme, dtype, embedding, [layer() for _ in range(shape.layers)], weighed(ones(shape.hidden), head), head)
