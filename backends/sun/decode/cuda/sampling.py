"""Sampling where the logits are: all rows at once, and one wait for the device a step.

The tokens are those of `sun.decode.engine.choose` for the same logits. The two can part only where the last places of
sums decide (these are in float64, the CPU's weights in float32): a random number within about 1e-6 of a boundary between two tokens'
probabilities, or equal logits at the edge of top_k or top_p, or in sorted order.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sun.decode.sampling import Choice, repeated, uniform

if TYPE_CHECKING:
    from sun.decode.sequence import Sequence

NUCLEUS = 1024
"""How many of the likeliest tokens are sorted before top_p (or a larger top_k) asks for more: a full sort costs milliseconds."""


@torch.inference_mode()
def choose(logits: Tensor, batch: list[Sequence]) -> list[Choice]:
    """Pick every sequence's next token from logits [batch, vocab] float32, on their device."""
    choices = _choose(logits, batch, NUCLEUS)
    # A nucleus of more tokens than were sorted is rare, and worth a second wait.
    return _choose(logits, batch, logits.shape[1]) if choices is None else choices


def _choose(logits: Tensor, batch: list[Sequence], sort: int) -> list[Choice] | None:
    """See `choose`; sort: so many of the likeliest tokens (at least) are sorted; None if top_p needs more."""
    params, device, vocab = [sequence.admit.params for sequence in batch], logits.device, logits.shape[1]
    changed = _changed(logits, batch)
    tokens, short = changed.argmax(dim=-1), torch.zeros((), dtype=torch.bool, device=device)
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    ranked = [i for i in drawn if params[i].top_k > 0 or params[i].top_p < 1]
    if plain := [i for i in drawn if i not in ranked]:
        temperature, min_p, u, _, _ = _put(_settings(plain, batch), device)
        rows = _put(plain, device)
        tokens[rows] = _invert(_probabilities(changed[rows], temperature, min_p), u)
    if ranked:
        rows, most = _put(ranked, device), min(vocab, max(sort, *(params[i].top_k for i in ranked)))
        tokens[rows], short = _draw_ranked(changed[rows], _put(_settings(ranked, batch), device), most)
    told = [i for i, p in enumerate(params) if p.logprobs is not None]
    most = max((params[i].logprobs for i in told), default=0)
    parts = [tokens, short[None]]
    if told:
        rows = _put(told, device)
        values = torch.log_softmax(logits[rows], dim=-1)
        top = values.topk(most)
        parts += [values.gather(1, tokens[rows, None]).flatten(), top.indices.flatten(), top.values.flatten()]
    # Ids and float32 are exact in float64, so that all comes in one copy: the step's one wait.
    came = torch.cat([part.double() for part in parts]).cpu()
    chosen, too_few, own, ids, values = came.split([len(batch), 1, len(told), len(told) * most, len(told) * most])
    if too_few:
        return None
    choices = [Choice(token) for token in chosen.long().tolist()]
    for at, i in enumerate(told):
        shown = slice(at * most, at * most + params[i].logprobs)
        choices[i] = Choice(choices[i].token, float(own[at]), list(zip(ids[shown].long().tolist(), values[shown].tolist(), strict=True)))
    return choices


def _put(values: list, device: torch.device) -> Tensor:
    """Numbers (int64 or float64) on the device, without waiting for it."""
    made = torch.tensor(values, dtype=torch.int64 if isinstance(values[0], int) else torch.float64)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made


def _settings(rows: list[int], batch: list[Sequence]) -> list[list[float]]:
    """[5, rows] float64: temperature, min_p, random number, top_k (0: all), top_p. Computed here while the device runs the step."""
    columns = []
    for sequence in map(batch.__getitem__, rows):
        params = sequence.admit.params
        columns.append((params.temperature, params.min_p, uniform(params.seed, sequence.position), float(max(params.top_k, 0)), params.top_p))
    return [list(row) for row in zip(*columns, strict=True)]


def _changed(logits: Tensor, batch: list[Sequence]) -> Tensor:
    """Logits with penalties and banned tokens, in a new tensor if there are any. See `sun.decode.sampling.penalise`."""
    seen, counted, banned = [], [], []
    for row, sequence in enumerate(batch):
        params = sequence.admit.params
        if params.penalised:
            seen += [(row, token, params.repetition_penalty) for token in {*sequence.admit.prompt, *sequence.generated}]
            for token, count in Counter(sequence.generated).items():
                # In float32, step by step, as the reference has it.
                penalty = params.presence_penalty + params.frequency_penalty * torch.tensor(count)
                counted.append((row, token, float(penalty)))
        banned += [(row, token, 0.0) for token in sequence.banned()]
    if not seen and not banned:
        return logits
    logits = logits.clone()
    for entries, change in (
            (seen, repeated),
            (counted, lambda values, penalty: values - penalty),
            (banned, lambda values, _: torch.full_like(values, -torch.inf))):
        if entries:
            rows, tokens, numbers = zip(*entries, strict=True)
            at = _put(list(rows), logits.device), _put(list(tokens), logits.device)
            logits[at] = change(logits[at], _put(list(numbers), logits.device).float())
    return logits


def _probabilities(logits: Tensor, temperature: Tensor, min_p: Tensor) -> Tensor:
    """[rows, vocab] float64: what temperature and min_p (both [rows]) leave, not normalised again."""
    logits = logits.double()
    # Less the maximum before the division: with a tiny temperature it would overflow to infinity and the softmax to NaN.
    probs = torch.softmax((logits - logits.amax(1, keepdim=True)) / temperature[:, None], dim=-1)
    return torch.where(probs >= min_p[:, None] * probs.amax(1, keepdim=True), probs, 0.0)


def _draw_ranked(logits: Tensor, settings: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Tokens [rows] by top_k and top_p of the ``most`` likeliest, and whether any row's nucleus has more."""
    temperature, min_p, u, top_k, top_p = settings
    probs = _probabilities(logits, temperature, min_p)
    mass, limited = probs.sum(1), top_k > 0
    ranked, ids = probs.topk(most)
    ranks = torch.arange(most, device=logits.device)
    ranked = torch.where(limited[:, None] & (ranks >= top_k[:, None]), 0.0, ranked)
    # top_p is over what top_k left; with top_k off that is all the mass.
    total = torch.where(limited, ranked.sum(1), mass)
    before = ranked.cumsum(1) - ranked
    kept = torch.where(before < (top_p * total)[:, None], ranked, 0.0)
    short = ~limited & (ranked.sum(1) < top_p * mass) if most < logits.shape[1] else torch.zeros_like(limited)
    return ids.gather(1, _invert(kept, u)[:, None]).flatten(), short.any()


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """Index [rows] at which the cumulative sum of ``weights`` [rows, n] passes ``u`` [rows] of its total."""
    cumulative = weights.cumsum(1)
    index = torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True)
    # Rounding at the far end: the last token that has weight.
    places = torch.arange(weights.shape[1], device=weights.device)
    last = torch.where(weights > 0, places, 0).amax(1, keepdim=True)
    there = weights.gather(1, index.clamp_max(weights.shape[1] - 1)) > 0
    return torch.where((index < weights.shape[1]) & there, index, last).flatten()
