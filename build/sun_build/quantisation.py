"""What a number format costs the decode module, layer by layer and in the end, and how fast it is here."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from sun.decode.cpu import CpuExecutor
from sun.decode.kv_pool import KVPool
from sun.model.llama import LINEARS, Llama
from sun.model.loading import load_decode
from sun.model.quantise import FULL, SCHEMES

CONTEXT = 256
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

    def __init__(self, full, low):
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


def logits_of(model: Llama, ids: Tensor) -> Tensor:
    """Logits [n, vocab] of one text's token ids [n], n >= 1."""
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).squeeze(0).transpose(0, 1).flatten(1)

    return model.logits(model.hidden(ids, torch.arange(len(ids)), attend))


@torch.inference_mode()
def loss(base_dir: str | Path, scheme: str, ids: Tensor) -> Loss:
    """What ``scheme`` loses on token ids [n]."""
    (_, full), (_, low) = load_decode(base_dir), load_decode(base_dir, scheme)
    got = logits_of(low, ids)
    compared = {}
    for index, (layer, other) in enumerate(zip(full.layers, low.layers, strict=True)):
        for name in LINEARS:
            part = name.split(".")[1].removesuffix("_proj")
            compared[f"layers.{index}.{name}"] = _Compared(getattr(layer, part), getattr(other, part))
            setattr(layer, part, compared[f"layers.{index}.{name}"])
    full.head = compared["lm_head"] = _Compared(full.head, low.head)
    expected = logits_of(full, ids)
    return Loss(
        scheme, len(ids), float((got.argmax(-1) == expected.argmax(-1)).float().mean()),
        float(F.kl_div(got.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean")),
        *(float(F.cross_entropy(logits[:-1], ids[1:]).exp()) for logits in (got, expected)),
        {name: layer.error for name, layer in compared.items()})


def step_ms(base_dir: str | Path, batch: int, threads: int = 1, schemes=(FULL, *SCHEMES), rounds: int = 7) -> dict[str, float]:
    """Median ms of a decode step of ``batch`` sequences of `CONTEXT` tokens by scheme; they take turns. Sets torch's threads."""
    torch.set_num_threads(threads)
    steps, times = {}, {scheme: [] for scheme in schemes}
    for scheme in schemes:
        base, model = load_decode(base_dir, scheme)
        pool = KVPool(base.geometry, batch * (CONTEXT + 1) + 1)
        pool.data.zero_()
        steps[scheme] = CpuExecutor(model, pool, threads), [pool.take(CONTEXT + 1) for _ in range(batch)]
    for turn in range(rounds + 1):
        for scheme, (executor, slots) in steps.items():
            started = time.perf_counter()
            executor.step([1] * batch, [CONTEXT] * batch, slots)
            if turn:
                times[scheme].append((time.perf_counter() - started) * 1e3)
    return {scheme: statistics.median(kept) for scheme, kept in times.items()}
