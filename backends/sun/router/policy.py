"""Which decode worker gets a sequence, by what workers report and what is on its way to them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

from sun.messages import Load

PACK_BATCH = 8
"""Sequences that a worker gets before `Pack` gives the next one any: on the CPUs that were measured, a step of so many costs little more than one of one."""


class Policy(Protocol):
    """Picks one of ``loads``, by worker name. Called under the pool's lock. None if no worker of ``loads`` may take the task.

    need: KV slots, in tokens, that the sequence takes.
    """

    def pick(self, task: str, loads: dict[str, Load], need: int = 0) -> str | None: ...


class LeastTokens:
    """The worker with the fewest outstanding tokens, among those that have room for the sequence if any has; any worker for any task.

    Ties go round, so that an idle pool fills evenly.
    """

    def __init__(self) -> None:
        self._turn = itertools.count()

    def pick(self, task: str, loads: dict[str, Load], need: int = 0) -> str | None:
        names = sorted(loads)
        if not names:
            return None
        turn = next(self._turn) % len(names)
        return min(names[turn:] + names[:turn], key=lambda name: (loads[name].room < need, loads[name].tokens))


class Pack:
    """The first worker, by name, that has fewer than ``full`` sequences and room for this one; if none has, as `LeastTokens`.

    For workers that share a memory bus, such as processes on one CPU: a step reads all weights however few sequences it serves, so two
    workers with half a batch each slow each other down where one with all of it would not.
    """

    def __init__(self, full: int = PACK_BATCH):
        if full < 1:
            raise ValueError(f"pack_batch: got {full}, must be at least 1")
        self._full, self._among_full = full, LeastTokens()

    def pick(self, task: str, loads: dict[str, Load], need: int = 0) -> str | None:
        roomy = (name for name in sorted(loads) if loads[name].sequences < self._full and loads[name].room >= need)
        return next(roomy, None) or self._among_full.pick(task, loads, need)


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._turn = itertools.count()

    def pick(self, task: str, loads: dict[str, Load], need: int = 0) -> str | None:
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

    def pick(self, task: str, loads: dict[str, Load], need: int = 0) -> str | None:
        if not loads:
            return None
        if task not in self._owners:
            free = sorted(loads.keys() - self._reserved)
            if not free:
                raise ValueError(f"owners: task {task!r} is not in it, and every worker belongs to another task")
            taken = list(itertools.chain.from_iterable(self._owners.values()))
            self._owners[task] = [min(free, key=taken.count)]
        return self._within.pick(task, {name: load for name, load in loads.items() if name in self._owners[task]}, need)


POLICIES = {"least_tokens": LeastTokens, "pack": Pack, "round_robin": RoundRobin, "partitioned": Partitioned}


def make_policy(name: str, owners: str = "", workers: Sequence[str] = (), pack_batch: int = 0) -> Policy:
    """The policy called ``name``. owners: as in `parse_owners`, for policy partitioned alone; pack_batch: for policy pack alone, 0 for its default.

    Raises ValueError naming the parameter at fault and what it can be.
    """
    if name not in POLICIES:
        raise ValueError(f"policy: got {name!r}, expected one of {', '.join(POLICIES)}")
    for parameter, given, of in (("owners", owners.split(), "partitioned"), ("pack_batch", pack_batch, "pack")):
        if given and name != of:
            raise ValueError(f"{parameter}: needs policy {of}, but policy is {name!r}")
    if owners.split():
        return Partitioned(parse_owners(owners, workers))
    return Pack(pack_batch) if pack_batch else POLICIES[name]()


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
