"""What a number format costs the decode module, layer by layer and in the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from sun.model.calibration import Layer, text_logits, wrap_linears
from sun.model.loading import load_decode

MOST_TOKENS = 1024


@dataclass(frozen=True)
class Loss:
    """Against float32 on the same tokens. layers: error of each linear layer's output as a share of the output, on float32's inputs.

    top1: share of tokens whose likeliest successor is the same. kl: mean KL divergence, nats. perplexity of this module and of float32.
    """

    scheme: str
    tokens: int
    top1: float
    kl: float
    perplexity: float
    full_perplexity: float
    layers: dict[str, float]

    def as_dict(self) -> dict:
        """As it is written to JSON."""
        return asdict(self)


class _Compared:
    """A linear layer of the full module that notes by how much the low-bit one's output differs."""

    def __init__(self, full: Layer, low: Layer):
        self.full, self.low, self.error = full, low, 0.0

    def __call__(self, x: Tensor) -> Tensor:
        y = self.full(x)
        self.error = float((self.low(x) - y).norm() / y.norm().clamp_min(1e-30))
        return y


def ids_of(base_dir: str | Path, text: str) -> Tensor:
    """The first `MOST_TOKENS` token ids of a text. Raises ValueError if there are fewer than 32: too few to tell anything."""
    ids = Tokenizer.from_file(str(Path(base_dir) / "tokenizer.json")).encode(text, add_special_tokens=False).ids[:MOST_TOKENS]
    if len(ids) < 32:
        raise ValueError(f"text: {len(ids)} tokens, at least 32 are needed")
    return torch.tensor(ids)


@torch.inference_mode()
def loss(base_dir: str | Path, scheme: str, ids: Tensor) -> Loss:
    """What ``scheme`` loses on token ids [n]."""
    (_, full), (_, low) = load_decode(base_dir), load_decode(base_dir, scheme)
    got, others = text_logits(low, ids), {}
    wrap_linears(low, lambda name, layer: others.setdefault(name, layer))
    compared: dict[str, _Compared] = {}

    def compare(name: str, layer: Layer) -> Layer:
        compared[name] = _Compared(layer, others[name])
        return compared[name]

    wrap_linears(full, compare)
    expected = text_logits(full, ids)
    return Loss(
        scheme, len(ids), float((got.argmax(-1) == expected.argmax(-1)).float().mean()),
        float(F.kl_div(got.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean")),
        *(float(F.cross_entropy(logits[:-1], ids[1:]).exp()) for logits in (got, expected)),
        {name: layer.error for name, layer in compared.items()})
