"""From logits to a token. A row's token depends on that row, its parameters, its seed and its position alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from sun.decode.params import SamplingParams


@dataclass(frozen=True)
class Choice:
    """A sampled token; with its log-probability and the likeliest alternatives if they were asked for."""

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


def uniform(seed: int, position: int) -> float:
    """Counter-based random number in [0, 1): the same for a seed and position, whatever was drawn before (Philox4x64, SC'11)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def repeated(values: Tensor, penalty: float | Tensor) -> Tensor:
    """Logits of tokens that have been seen, with the repetition penalty (CTRL, arXiv 1909.05858); finite, however small the penalty."""
    most = torch.finfo(values.dtype).max
    return torch.where(values > 0, values / penalty, values * penalty).clamp(-most, most)


def penalise(logits: Tensor, params: SamplingParams, prompt: Tensor, generated: Tensor) -> Tensor:
    """Logits [vocab] with penalties, in a new tensor. prompt, generated: token ids (int64).

    Repetition counts prompt and output; presence and frequency (OpenAI) the output alone.
    """
    logits = logits.clone()
    if params.repetition_penalty != 1.0:
        seen = torch.cat((prompt, generated)).unique()
        values = logits[seen]
        logits[seen] = repeated(values, params.repetition_penalty)
    if len(generated):
        ids, counts = generated.unique(return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


def draw(logits: Tensor, params: SamplingParams, position: int) -> int:
    """Sample one token from logits [vocab] with temperature > 0, see `lot`."""
    from sun.decode.lot import lot  # here, because a GPU's choice needs this file and no numba

    assert params.seed is not None
    row = logits.to(torch.float32).contiguous().numpy()
    return int(lot(row, params.temperature, params.min_p, params.top_k, params.top_p, uniform(params.seed, position)))


def logprobs(logits: Tensor, token: int, count: int) -> Choice:
    """``token`` with its log-probability and the ``count`` likeliest tokens', from unmodified logits [vocab]."""
    values = torch.log_softmax(logits, dim=-1)
    top_values, top_ids = values.topk(count) if count else (values[:0], torch.empty(0, dtype=torch.int64))
    return Choice(token, float(values[token]), list(zip(top_ids.tolist(), top_values.tolist(), strict=True)))
