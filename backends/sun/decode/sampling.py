"""From logits to a token. A row's token depends on that row, its parameters, its seed and its position alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from sun.decode.params import SamplingParams

NUCLEUS = 1024
"""How many of the likeliest tokens are sorted before top_p (or a larger top_k) asks for more: a full sort costs milliseconds."""


@dataclass(frozen=True)
class Choice:
    """A sampled token; with its log-probability and the likeliest alternatives if they were asked for."""

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


def uniform(seed: int, position: int) -> float:
    """Counter-based random number in [0, 1): the same for a seed and position, whatever was drawn before (Philox4x64, SC'11)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def penalise(logits: Tensor, params: SamplingParams, prompt: Tensor, generated: Tensor) -> Tensor:
    """Logits [vocab] with penalties, in a new tensor. prompt, generated: token ids (int64).

    Repetition (CTRL, arXiv 1909.05858) counts prompt and output; presence and frequency (OpenAI) the output alone.
    """
    logits = logits.clone()
    if params.repetition_penalty != 1.0:
        seen = torch.cat((prompt, generated)).unique()
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if len(generated):
        ids, counts = generated.unique(return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


def draw(logits: Tensor, params: SamplingParams, position: int) -> int:
    """Sample one token from logits [vocab] with temperature > 0: temperature, then min_p, top_k, top_p (vLLM's order)."""
    assert params.seed is not None
    logits = logits.double()
    # Less the maximum before the division: with a tiny temperature it would overflow to infinity and the softmax to NaN.
    probs = torch.softmax((logits - logits.max()) / params.temperature, dim=-1)
    u = uniform(params.seed, position)
    if params.min_p > 0:
        probs = torch.where(probs >= params.min_p * probs.max(), probs, 0.0)
    if params.top_k < 1 and params.top_p >= 1:
        return _invert(probs, u)
    vocab = probs.shape[-1]
    limit = min(params.top_k, vocab) if params.top_k > 0 else vocab
    mass = probs.sum()
    sorted_probs, ids = probs.topk(min(limit, NUCLEUS))
    if limit > NUCLEUS and (params.top_k > 0 or sorted_probs.sum() < params.top_p * mass):
        sorted_probs, ids = probs.topk(limit)
    # top_p is over what top_k left; with top_k off that is all the mass.
    total = sorted_probs.sum() if params.top_k > 0 else mass
    before = sorted_probs.cumsum(0) - sorted_probs
    kept = torch.where(before < params.top_p * total, sorted_probs, 0.0)
    return int(ids[_invert(kept, u)])


def _invert(weights: Tensor, u: float) -> int:
    """Index at which the cumulative sum of ``weights`` [n] passes ``u`` of its total."""
    cumulative = weights.cumsum(0)
    index = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    if index >= len(weights) or weights[index] <= 0:  # rounding at the far end: take the last token that has weight
        index = int(weights.nonzero()[-1])
    return index


def logprobs(logits: Tensor, token: int, count: int) -> Choice:
    """``token`` with its log-probability and the ``count`` likeliest tokens', from unmodified logits [vocab]."""
    values = torch.log_softmax(logits, dim=-1)
    top_values, top_ids = values.topk(count) if count else (values[:0], torch.empty(0, dtype=torch.int64))
    return Choice(token, float(values[token]), list(zip(top_ids.tolist(), top_values.tolist(), strict=True)))
