"""Two systems by turns: one runs a wave while the other is frozen, at every concurrency, A B A B."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sun_perf.peers.prompts import Prompts
from sun_perf.peers.system import System
from sun_perf.peers.wave import Wave


@dataclass(frozen=True)
class Load:
    """concurrency: requests of a wave, each value in turn. tokens: of an answer. rounds: waves of each side at each concurrency."""

    concurrency: Sequence[int]
    tokens: int
    rounds: int


def duel(ours: System, theirs: System, load: Load, report: Callable[[str], None]) -> dict[int, tuple[list[Wave], list[Wave]]]:
    """Concurrency -> our waves and theirs. Both are started and thawed; both are thawed at the end. A first wave of each is thrown away."""
    sides = (ours, theirs)
    prompts = Prompts()
    for side in sides:
        side.freeze()
    try:
        for side in sides:
            with _running(side):
                side.wave(prompts.take(min(load.concurrency)), load.tokens)
        found: dict[int, tuple[list[Wave], list[Wave]]] = {}
        for concurrency in load.concurrency:
            waves: tuple[list[Wave], list[Wave]] = ([], [])
            for _ in range(load.rounds):
                for side, done in zip(sides, waves, strict=True):
                    with _running(side):
                        done.append(side.wave(prompts.take(concurrency), load.tokens))
            found[concurrency] = waves
            report(f"{concurrency} requests: ours " + " / ".join(f"{wave.tokens_per_s:.0f}" for wave in waves[0])
                   + ", theirs " + " / ".join(f"{wave.tokens_per_s:.0f}" for wave in waves[1]) + " tokens/s")
        return found
    finally:
        for side in sides:
            side.thaw()


@contextmanager
def _running(side: System):
    side.thaw()
    try:
        yield
    finally:
        side.freeze()
