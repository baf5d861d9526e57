"""What a bench runs: quick in minutes, full with every system, task mix and number of tasks."""

from __future__ import annotations

from dataclasses import dataclass

from sun_perf.workload import Lengths

EQUAL_LOAD = 0.6
"""Where TPOT is compared: this share of the request rate that the slowest system sustains, so that all keep up."""


@dataclass(frozen=True)
class Plan:
    """One number of tasks. alphas: Zipf exponents of the mix, 0 is uniform. loads: open-loop rates, as shares of what all systems sustain.

    rounds: how often every system takes its turn after the first, which finds what they sustain. requests: of a closed loop of
    ``concurrency``, and of an open loop. Prompts in words, answers in tokens.
    """

    tasks: int = 4
    systems: tuple[str, ...] = ("partitioned", "sun")
    alphas: tuple[float, ...] = (0.0, 1.2)
    loads: tuple[float, ...] = (EQUAL_LOAD,)
    rounds: int = 1
    requests: int = 40
    concurrency: int = 16
    prompt: Lengths = Lengths(24, 0.6, 4, 128)
    output: Lengths = Lengths(32, 0.5, 8, 96)


@dataclass(frozen=True)
class Bench:
    """Plans, the first of which is the one that the claims are made of; numbers of tasks to measure memory at; turns of server and bare engine."""

    plans: tuple[Plan, ...]
    memory_tasks: tuple[int, ...]
    engine_rounds: int


QUICK = Bench((Plan(systems=("partitioned", "sun", "qsun"), alphas=(0.0, 1.2, 2.0)),), memory_tasks=(2, 4), engine_rounds=2)
FULL = Bench(
    (
        Plan(systems=("partitioned", "sun", "sun_all", "qsun"), alphas=(0.0, 0.8, 1.2, 2.0), loads=(EQUAL_LOAD, 0.9, 1.2), rounds=2),
        Plan(tasks=2, alphas=(1.2,), rounds=2),
        Plan(tasks=8, alphas=(1.2,), rounds=2),
    ), memory_tasks=(1, 2, 4, 8), engine_rounds=5)
BENCHES = {"quick": QUICK, "full": FULL}
