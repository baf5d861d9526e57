"""Which decode worker gets a sequence. Workers report their load in tokens; nothing is guessed from request counts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol


class Policy(Protocol):
    """Picks one of ``loads``: worker name -> tokens its sequences may still generate. Called under the pool's lock.

    None if no worker of ``loads`` may take the task.
    """

    def pick(self, task: str, loads: dict[str, int]) -> str | None: ...


class LeastTokens:
    """The worker with the fewest outstanding tokens; any worker for any task. Ties go round, so that an idle pool fills evenly."""

    def __init__(self) -> None:
        self._turn = itertools.count()

    def pick(self, task: str, loads: dict[str, int]) -> str | None:
        names = sorted(loads)
        if not names:
            return None
        turn = next(self._turn) % len(names)
        return min(names[turn:] + names[:turn], key=lambda name: loads[name])


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._turn = itertools.count()

    def pick(self, task: str, loads: dict[str, int]) -> str | None:
        names = sorted(loads)
        return names[next(self._turn) % len(names)] if names else None


class Partitioned:
    """Every task has workers of its own: conventional disaggregation, the baseline. Least tokens among them.

    owners: task -> its workers. A task that is not in it is given the next workers in turn when it first comes; workers that
    ``owners`` names are never among those, since they may decode with their task's own weights.
    """

    def __init__(self, owners: dict[str, list[str]] | None = None):
        self._owners = {task: list(workers) for task, workers in (owners or {}).items()}
        self._reserved = frozenset(itertools.chain.from_iterable(self._owners.values()))
        self._within = LeastTokens()

    def pick(self, task: str, loads: dict[str, int]) -> str | None:
        if not loads:
            return None
        if task not in self._owners:
            free = sorted(loads.keys() - self._reserved)
            if not free:
                raise ValueError(f"owners: task {task!r} is not in it, and every worker belongs to another task")
            taken = list(itertools.chain.from_iterable(self._owners.values()))
            self._owners[task] = [min(free, key=taken.count)]
        return self._within.pick(task, {name: load for name, load in loads.items() if name in self._owners[task]})


POLICIES = {"least_tokens": LeastTokens, "round_robin": RoundRobin, "partitioned": Partitioned}


def make_policy(name: str, owners: str = "", workers: Sequence[str] = ()) -> Policy:
    """The policy called ``name``; owners as in `parse_owners`, for policy partitioned alone.

    Raises ValueError naming the parameter at fault and what it can be.
    """
    if name not in POLICIES:
        raise ValueError(f"policy: got {name!r}, expected one of {', '.join(POLICIES)}")
    if not owners.split():
        return POLICIES[name]()
    if name != "partitioned":
        raise ValueError(f"owners: needs policy partitioned, but policy is {name!r}")
    return Partitioned(parse_owners(owners, workers))


def parse_owners(text: str, workers: Sequence[str]) -> dict[str, list[str]]:
    """Read "banking=decode_0 bash=decode_1,decode_2": task -> its workers, which must be among ``workers``.

    Raises ValueError beginning with "owners:" for malformed entries, unknown workers, and tasks or workers named twice.
    """
    owners: dict[str, list[str]] = {}
    for entry in text.split():
        task, _, names = entry.partition("=")
        if not task or not all(mine := names.split(",")):
            raise ValueError(f"owners: got {entry!r}, expected task=worker or task=worker,worker")
        if task in owners:
            raise ValueError(f"owners: task {task!r} is named twice")
        for name in mine:
            if name not in workers:
                raise ValueError(f"owners: {name!r} of task {task!r} is not a worker; the workers are {', '.join(workers)}")
            if name in itertools.chain(*owners.values()) or mine.count(name) > 1:
                raise ValueError(f"owners: worker {name!r} is named twice; a worker belongs to one task")
        owners[task] = mine
    return owners
