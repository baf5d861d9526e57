"""Gradient checkpointing of a module whose K and V are wanted: transformers' own drops the cache."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class LayerCache:
    """One layer's part of a KV cache, made anew for each run of the layer, so that running it again changes nothing."""

    def __init__(self, keys: Tensor | None, values: Tensor | None):
        self.past = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Remember the new K and V [B, kv_heads, T, head_dim]; returns them after those before."""
        self.new = keys, values
        past_keys, past_values = self.past
        if past_keys is None or past_values is None:
            return keys, values
        return torch.cat((past_keys, keys), dim=-2), torch.cat((past_values, values), dim=-2)


def checkpoint_layers(model: nn.Module) -> None:
    """Make a transformers decoder keep only each layer's input, K and V, and run the layer again in the backward pass."""
    for index, layer in enumerate(model.get_decoder().layers):
        layer.forward = partial(_run, layer.forward, index)


def _run(forward, index: int, hidden: Tensor, **kwargs):
    if not torch.is_grad_enabled():
        return forward(hidden, **kwargs)
    name = "cache" if "cache" in kwargs else "past_key_values"
    cache = kwargs.pop(name)
    past = (cache.layers[index].keys, cache.layers[index].values) if cache.get_seq_length(index) else (None, None)

    def layer(hidden: Tensor, keys: Tensor | None, values: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        here = LayerCache(keys, values)
        return (forward(hidden, **kwargs, **{name: here}), *here.new)

    out, keys, values = checkpoint(layer, hidden, *past, use_reentrant=False)
    cache.update(keys, values, index)
    return out
