"""A task's prefill module as the torch module that exporters trace: token ids in, stacked KV out, and for whole prompts the states behind them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sun.model.llama import LINEARS, Llama
from sun.model.loading import load_prefill
from sun.model.manifest import BaseManifest, TaskManifest
from sun.model.weights import Linear, load_lora, map_checkpoint
from sun.prefill.exported import checkpoint_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LORA = ("lora_A", "lora_B")
"""What an adapter's halves are called after their layer's name; B is scaled, so that y = x W^T + (x A^T) B^T."""


class LowLinear(Linear):
    """A linear layer in its weights' type between float32 neighbours: the residual stream, norms and RoPE stay float32."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x.to(self.weight.dtype)).float()


class PrefillModule(nn.Module):
    """``forward`` gives what `sun.prefill.exported.outputs` names, of prompts that are padded on their right.

    Attention is causal, so what stands behind a prompt changes nothing of its KV: prompts' lengths need not be known, and what comes
    of padding is to be thrown away. Parameters have their names in the checkpoint; an adapter's halves are called
    ``model.<layer>.lora_A`` and ``lora_B``.
    dtype: of linear layers and attention, a key of `DTYPES`; all between them, and the KV, is float32. merged: an adapter is added
    into the weights it belongs to, in place of parameters of its own. states: `forward` gives the states after the last layer, too.
    """

    def __init__(self, base: BaseManifest, tensors: dict[str, Tensor], lora: dict[str, tuple[Tensor, Tensor]], dtype: str = "fp32",
                 merged: bool = True, states: bool = False):
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
        self.base, self.dtype, self.states = base, DTYPES[dtype], states
        self.adapted = () if merged else tuple(sorted(lora))
        for name, tensor in tensors.items():
            down, up = lora.get(name.removeprefix("model.").removesuffix(".weight"), (None, None))
            self._put(name, tensor if down is None or not merged else tensor.float() + up @ down)
        for layer in self.adapted:
            for half, tensor in zip(LORA, lora[layer], strict=True):
                self._put(f"model.{layer}.{half}", tensor)

    @classmethod
    def load(cls, base_dir: str | Path, task_dir: str | Path, dtype: str = "fp32", merged: bool = True) -> tuple[TaskManifest, PrefillModule]:
        """A task's module from its folder. Raises ValueError as `load_prefill` does."""
        task, checked = load_prefill(base_dir, task_dir)
        tensors = map_checkpoint(checkpoint_of(base_dir, task_dir, task))
        tensors.pop("lm_head.weight", None)  # prefill computes no logits
        lora = load_lora(task_dir) if task.weights == "lora" else {}
        if not task.whole_prompt:
            last = f"layers.{checked.geometry.layers - 1}."
            lora = {name: halves for name, halves in lora.items() if not name.startswith(last) or name.endswith(("k_proj", "v_proj"))}
        return task, cls(checked.base, tensors, lora, dtype, merged, task.whole_prompt)

    @property
    def adapter(self) -> dict[str, Tensor]:
        """The parameters of an adapter that is not merged, by name."""
        return {name: parameter.data for name, parameter in self.named_parameters() if name.endswith(LORA)}

    def _put(self, name: str, tensor: Tensor) -> None:
        *path, leaf = name.split(".")
        at: nn.Module = self
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]
        dtype = self.dtype if "_proj." in name else torch.float32
        at.register_parameter(leaf, nn.Parameter(tensor.to(dtype), requires_grad=False))

    def _llama(self) -> Llama:
        """The decoder over the parameters as they are now: while an exporter traces, they are its stand-ins."""
        tensors: dict[str, Tensor] = dict(self.named_parameters())
        lora = {layer: (tensors[f"model.{layer}.{LORA[0]}"], tensors[f"model.{layer}.{LORA[1]}"]) for layer in self.adapted}
        model = Llama(self.base, tensors, lora)
        if self.dtype is not torch.float32:
            for index, layer in enumerate(model.layers):
                for attribute, name in zip(("q", "k", "v", "o", "gate", "up", "down"), LINEARS, strict=True):
                    place = f"layers.{index}.{name}"
                    setattr(layer, attribute, LowLinear(tensors[f"model.{place}.weight"], tensors.get(f"model.{place}.bias"), lora.get(place)))
        return model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """KV [batch, layers, 2, kv_heads, length, head_dim] float32 of token ids [batch, length] (int64); with `states` those, too: [batch, length, hidden] float32."""
        batch, length = input_ids.shape
        kept: list[Tensor] = []

        def keep(layer: int, k: Tensor, v: Tensor) -> None:
            kept.append(torch.stack((k, v)))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keep(layer, k, v)
            return causal(q, k, v)

        def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.to(self.dtype).unflatten(0, (batch, length)).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).flatten(2).flatten(0, 1).float()

        llama, positions = self._llama(), torch.arange(length).repeat(batch)
        x = llama.fill(input_ids.flatten(), positions, attend, keep)
        # [layers, 2, batch * length, kv_heads, head_dim]
        kv = torch.stack(kept).unflatten(2, (batch, length)).permute(2, 0, 1, 4, 3, 5)
        if not self.states:
            return (kv,)
        return kv, llama.end(x, positions, lambda q: causal(q, *kept[-1])).unflatten(0, (batch, length))
