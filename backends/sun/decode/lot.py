"""Drawing a token from a row of logits, compiled by numba as the kernels are (see `sun.decode.kernels`)."""

from __future__ import annotations

import numpy as np

from sun.decode.kernels import F32, compiled, exponential

BLOCK = 64
"""Tokens whose weights are summed, and whose largest is noted, together."""

HALVINGS = 12
"""Of the range of weights, when looking for the lightest that top_p leaves."""


@compiled
def lot(logits, temperature, min_p, top_k, top_p, u):
    """The token of logits [vocab] (float32) that ``u`` in [0, 1) falls to: temperature, then min_p, top_k, top_p (vLLM's order).

    temperature > 0. top_k < 1 and top_p >= 1 are off. Tokens lie in the order of their ids, or with top_k or top_p of their weights.
    """
    vocab = logits.shape[0]
    top = logits[0]
    for i in range(vocab):
        top = max(top, logits[i])
    # A tiny temperature is as good as the smallest one that does not overflow.
    inverse = F32(min(1.0 / temperature, 1e30))
    weights = np.empty(vocab, F32)
    for i in range(vocab):
        z = (logits[i] - top) * inverse
        weight = exponential(z)
        weights[i] = weight if z > F32(-87.0) and weight >= min_p else F32(0.0)
    blocks = (vocab + BLOCK - 1) // BLOCK
    sums, largest = np.empty(blocks, np.float64), np.empty(blocks, F32)
    for b in range(blocks):
        total, most = 0.0, F32(0.0)
        for i in range(b * BLOCK, min(vocab, (b + 1) * BLOCK)):
            total += weights[i]
            most = max(most, weights[i])
        sums[b], largest[b] = total, most
    mass = sums.sum()
    if top_k < 1 and top_p >= 1.0:
        # The block first, so that sums need not be taken one by one over the whole vocabulary.
        target, before, b = u * mass, 0.0, 0
        while b < blocks - 1 and before + sums[b] <= target:
            before += sums[b]
            b += 1
        return _fall(weights, b * BLOCK, min(vocab, (b + 1) * BLOCK), before, target)
    # Only tokens of at least this weight can be left. As many blocks as top_k have one at least as large as the top_k-th largest of the
    # blocks' largest; and all tokens below an equal share of what top_p leaves out add up to less than that.
    least = F32(0.0)
    if top_k > 0:
        if top_k <= blocks:
            least = np.sort(largest)[blocks - top_k]
    else:
        least = F32((1.0 - top_p) * mass / vocab * (1.0 - 1e-6))
    ids, found = np.empty(vocab, np.int64), 0
    for b in range(blocks):
        if largest[b] >= least:
            for i in range(b * BLOCK, min(vocab, (b + 1) * BLOCK)):
                if weights[i] >= least and weights[i] > F32(0.0):
                    ids[found] = i
                    found += 1
    ids = ids[:found]
    if not found:  # no logit is a number: any token, but one of the vocabulary
        return np.argmax(logits)
    if top_k < 1:
        ids = _heaviest(ids, weights, least, top_p * mass)
    ids = ids[np.argsort(-weights[ids], kind="mergesort")]
    if top_k > 0:
        ids = ids[:top_k]
        mass = weights[ids].astype(np.float64).sum()
    kept, inside = 0, 0.0
    while kept < ids.shape[0] and inside < top_p * mass:
        inside += weights[ids[kept]]
        kept += 1
    return ids[_fall(weights[ids], 0, max(kept, 1), 0.0, u * inside)]


@compiled
def _heaviest(ids, weights, least, share):
    """Of ids with weights of at least ``least`` those heavier than some bound that still add up to ``share``: few need be sorted then."""
    mine, low, high = weights[ids], max(least, F32(1e-38)), F32(1.0)
    for _ in range(HALVINGS):
        middle = F32(np.sqrt(np.float64(low) * high))
        total = 0.0
        for i in range(mine.shape[0]):
            total += mine[i] if mine[i] >= middle else F32(0.0)
        if total * (1.0 - 1e-6) >= share:
            low = middle
        else:
            high = middle
    return ids[mine >= low]


@compiled
def _fall(weights, first, end, before, target):
    """The index from ``first`` to ``end`` at which the sum of weights, ``before`` it at the first, passes ``target``; the last that has weight if rounding leaves none."""
    last = -1
    for i in range(first, end):
        before += weights[i]
        if weights[i] > F32(0.0):
            last = i
            if before > target:
                return i
    # The last block may be empty: then it is the last token before it that has weight.
    while last < 0:
        first -= 1
        if first < 0 or weights[first] > F32(0.0):
            last = max(first, 0)
    return last
