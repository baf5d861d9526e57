"""How large the inputs of each linear layer get, column by column: what a scheme with 8-bit inputs evens out (SmoothQuant)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from sun.model.llama import LINEARS, Llama
from sun.model.quantise import HEAD

TEXT = """<|im_start|>user
My card has not arrived yet, although I ordered it two weeks ago. What should I do?<|im_end|>
<|im_start|>assistant
I am sorry to hear that. Please check the delivery address in the app; if it is right, we can send you a new card, free of charge.<|im_end|>
A train leaves at 7:45 and covers 312 km in 2.5 hours. Its mean speed is 312 / 2.5 = 124.8 km/h, so it arrives at 10:15.
find . -name "*.log" -mtime +30 -size +10M -print0 | xargs -0 rm -f && echo "done: $(date)"
def area(radius: float) -> float:
    \"\"\"Area of a circle.\"\"\"
    return 3.14159 * radius ** 2
{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius", "days": [1, 2, 3]}}
The history of printing began long before Gutenberg: woodblocks were cut in China in the ninth century, and movable type of clay followed.
Die Würde des Menschen ist unantastbar. El agua hierve a cien grados. L'amour est un oiseau rebelle.
1. Mix the flour with sugar. 2. Add two eggs and 50 g of butter. 3. Bake it for 25 minutes at 180 °C, then let it cool!
"""
"""A little of everything, about 350 tokens: which columns are large hardly depends on the text."""


Layer = Callable[[Tensor], Tensor]


class _Watched:
    """A linear layer that remembers the largest magnitude of every input column."""

    def __init__(self, inner: Layer):
        self.inner, self.top = inner, torch.zeros(())

    def __call__(self, x: Tensor) -> Tensor:
        self.top = torch.maximum(self.top, x.abs().amax(0))
        return self.inner(x)


@torch.inference_mode()
def input_ranges(model: Llama, ids: Iterable[int]) -> dict[str, Tensor]:
    """Largest magnitudes [in] of the inputs of each linear layer ("layers.0.self_attn.q_proj", "lm_head") over token ids."""
    watched: dict[str, _Watched] = {}

    def watch(name: str, layer: Layer) -> Layer:
        watched[name] = _Watched(layer)
        return watched[name]

    wrap_linears(model, watch)
    text_logits(model, torch.tensor(list(ids)))
    return {name: layer.top for name, layer in watched.items()}


def wrap_linears(model: Llama, wrap: Callable[[str, Layer], Layer]) -> None:
    """Put ``wrap(name, layer)`` in the place of each linear layer of a model, the head ("lm_head") included."""
    for index, layer in enumerate(model.layers):
        for name in LINEARS:
            part = name.split(".")[1].removesuffix("_proj")
            setattr(layer, part, wrap(f"layers.{index}.{name}", getattr(layer, part)))
    model.head = wrap(HEAD, model.head)


def text_logits(model: Llama, ids: Tensor) -> Tensor:
    """Logits [n, vocab] of one text's token ids [n], n >= 1, in one pass."""
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).squeeze(0).transpose(0, 1).flatten(1)

    return model.logits(model.hidden(ids, torch.arange(len(ids)), attend))
