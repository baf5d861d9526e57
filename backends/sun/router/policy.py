"""Which decode worker gets a sequence. Workers report their load in tokens; nothing is guessed from request counts."""

from __future__ import annotations

import itertools
from typing import Protocol


class Policy(Protocol):
    """Picks one of ``loads``: worker name -> tokens its sequences may still generate. Called under the router's lock."""

    def pick(self, task: str, loads: dict[str, int]) -> str: ...


class LeastTokens:
    """The worker with the fewest outstanding tokens; any worker for any task. Ties go round, so that an idle pool fills evenly."""

    def __init__(self) -> None:
        self._turn = itertools.count()

    def pick(self, task: str, loads: dict[str, int]) -> str:
        names = sorted(loads)
        turn = next(self._turn) % len(names)
        return min(names[turn:] + names[:turn], key=lambda name: loads[name])


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._turn = itertools.count()

    def pick(self, task: str, loads: dict[str, int]) -> str:
        names = sorted(loads)
        return names[next(self._turn) % len(names)]


class Partitioned:
    """Every task has workers of its own: conventional disaggregation, the baseline. Least tokens among them.

    owners: task -> its workers. A task that is not in it is given the next workers in turn when it first comes.
    """

    def __init__(self, owners: dict[str, list[str]] | None = None):
        self._owners = {task: list(workers) for task, workers in (owners or {}).items()}
        self._within = LeastTokens()

    def pick(self, task: str, loads: dict[str, int]) -> str:
        if task not in self._owners:
            taken = list(itertools.chain.from_iterable(self._owners.values()))
            self._owners[task] = [min(sorted(loads), key=taken.count)]
        mine = {name: load for name, load in loads.items() if name in self._owners[task]}
        if not mine:
            raise ValueError(f"task {task!r} is partitioned to {self._owners[task]}, none of which is in the pool {sorted(loads)}")
        return self._within.pick(task, mine)


POLICIES = {"least_tokens": LeastTokens, "round_robin": RoundRobin, "partitioned": Partitioned}


def make_policy(name: str) -> Policy:
    """The policy called ``name``; raises ValueError listing the names there are."""
    if name not in POLICIES:
        raise ValueError(f"policy: got {name!r}, expected one of {', '.join(POLICIES)}")
    return POLICIES[name]()
