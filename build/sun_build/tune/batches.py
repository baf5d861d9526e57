"""Which examples go into which step: a whole run planned at once, so that a run that was stopped goes on with the same ones."""

from __future__ import annotations

import random

from sun_build.tune.data import Example

WINDOW = 16
"""Batches' worth of shuffled examples that are sorted by length together: fewer would pad more, more would shuffle less."""


def steps_in(epochs: float, examples: int, size: int) -> int:
    """Steps of ``size`` that `plan_batches` makes of so many epochs, or the nearest number; one at least."""
    return max(1, round(epochs * max(1, examples // size)))


def plan_batches(rows: list[Example], size: int, count: int, seed: int) -> list[list[int]]:
    """Indices into ``rows`` of ``count`` batches of ``size``: epoch after epoch, shuffled, each batch of about one length.

    Rows that fill no batch are left out of an epoch, other ones each time. With fewer rows than one batch, each batch is all of them.
    """
    rng = random.Random(seed)
    batches: list[list[int]] = []
    while len(batches) < count:
        order = rng.sample(range(len(rows)), len(rows))
        # Before they are sorted by length: it would always be the longest.
        order = order[: max(len(rows) // size * size, min(size, len(rows)))]
        epoch = []
        for start in range(0, len(order), WINDOW * size):
            near = sorted(order[start : start + WINDOW * size], key=lambda i: (len(rows[i].prompt), len(rows[i].response)))
            epoch += [near[i : i + size] for i in range(0, len(near), size)]
        rng.shuffle(epoch)
        batches += epoch
    return batches[:count]
