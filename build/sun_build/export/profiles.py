"""Which shapes a TensorRT plan is built for."""

from __future__ import annotations

from dataclasses import dataclass

SHORT = 256
"""Prompts up to here have a profile of their own: kernels are chosen at a profile's best shape."""


@dataclass(frozen=True)
class Profile:
    """Shapes [batch, length] of the token ids: the smallest, the one that kernels are tuned for, the largest."""

    least: tuple[int, int]
    best: tuple[int, int]
    most: tuple[int, int]


def profiles(max_batch: int, max_tokens: int) -> list[Profile]:
    """Short prompts in batches, and long ones alone or few; the last covers all. Raises ValueError naming a limit below 1."""
    for name, value in (("max_batch", max_batch), ("max_tokens", max_tokens)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, must be 1 or more")
    short, half = min(SHORT, max_tokens), (max_batch + 1) // 2
    made = [Profile((1, 1), (half, (short + 1) // 2), (max_batch, short))]
    if max_tokens > SHORT:
        made.append(Profile((1, 1), (1, min(2 * SHORT, max_tokens)), (max_batch, max_tokens)))
    return made
