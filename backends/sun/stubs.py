"""Which of this server's models have a living process. Triton itself does not say: a killed stub's model stays ready, its calls never end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
INSTANCE = 8
"""Where a stub's command line has the name of its model's instance (Triton 24.10)."""
DEATH_S, LOOK_S = 2.0, 0.005
"""How long a killed process is waited for at most, and how often it is looked for."""
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
"""The kernel tells a process's start in these, rounded down."""


class Stubs:
    """The processes of a tritonserver's Python models. Safe to use from any thread. server: its pid."""

    def __init__(self, server: int):
        self._server = server
        self._known: dict[str, frozenset[int]] = {}

    def pids(self, model: str) -> frozenset[int]:
        """The living processes of a model: one for each of its instances, none if it is not loaded."""
        known = self._known.get(model, frozenset())
        if not known or not self.alive(known):
            self._known = self.models()
            known = self._known.get(model, frozenset())
        return known

    def alive(self, pids: frozenset[int]) -> bool:
        """Whether all of these processes live; one that is dead and not waited for yet does not."""
        return all(self._lives(pid) for pid in pids)

    def killed(self, pids: frozenset[int]) -> frozenset[int]:
        """Those that are dead, while their server has not noticed: it waits for one that it has ended itself."""
        return self._in_state("Z", pids)

    def stopped(self, pids: frozenset[int]) -> frozenset[int]:
        """Those that somebody has stopped (SIGSTOP)."""
        return self._in_state("T", pids)

    def kill(self, model: str, pids: frozenset[int]) -> None:
        """SIGKILL to those of a model's processes that live, and wait until they are dead; whoever else has one of these pids by now is left alone."""
        hit = frozenset(pid for pid in pids if self._lives(pid) and _model(pid) == model)
        for pid in hit:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # On a busy machine that takes a while, in which a new call would be taken for one that the dying process had.
        until = time.monotonic() + DEATH_S
        while any(map(self._lives, hit)) and time.monotonic() < until:
            time.sleep(LOOK_S)

    def models(self) -> dict[str, frozenset[int]]:
        """Every model's living processes."""
        found: dict[str, set[int]] = {}
        for entry in os.scandir(PROC):
            if entry.name.isdigit() and self._lives(pid := int(entry.name)) and (model := _model(pid)):
                found.setdefault(model, set()).add(pid)
        return {model: frozenset(pids) for model, pids in found.items()}

    def _in_state(self, state: str, pids: frozenset[int]) -> frozenset[int]:
        return frozenset(pid for pid in pids if (seen := stat(pid)) and seen.state == state and seen.parent == self._server)

    def _lives(self, pid: int) -> bool:
        seen = stat(pid)
        return seen is not None and seen.parent == self._server and seen.lives


class Holders:
    """Those of a model's processes that may hold a call, from the call's begin on. pids: who they are, none if the model is not loaded.

    Which of them has it, Triton does not say: while it updates a model, calls go to the new process though the old one still ends its own.
    """

    def __init__(self, stubs: Stubs, model: str):
        self._stubs, self._model = stubs, model
        self._seen = _now()
        self.pids = stubs.pids(model)
        self._killed: frozenset[int] = frozenset()

    def lost(self, answered: bool = False) -> bool:
        """Whether a process died that may have had the call. answered: whether Triton has ended the call, else look again at times.

        Triton ends a process only after the process's calls, so at an update's end the call is with the new one, which loaded, and thus
        lived, beside the old one. One that came up after the death, as by a heal, never had the call. Nor does it help that another lives
        where one was killed: the call may have been with the dead.
        """
        if self._stubs.alive(self.pids):
            self._seen, self._killed = _now(), frozenset()
            return False
        living = self._stubs.models().get(self._model, frozenset())
        beside = frozenset(pid for pid in living if (found := stat(pid)) and found.started + TICK_S <= self._seen)
        before, self._killed = self._killed, self._stubs.killed(self.pids)
        # Twice in a row: one that the server has ended itself is also seen so, for a moment.
        if not beside or self._killed & (self._killed if answered else before):
            return True
        if not self._killed:
            self.pids = beside
        return False


class Stat(NamedTuple):
    """A process's state (a letter as in ps), parent, process group and session, and when it started, in seconds since the machine's boot."""

    state: str
    parent: int
    group: int
    session: int
    started: float

    @property
    def lives(self) -> bool:
        """Zombies do not."""
        return self.state not in "ZX"


def stat(pid: int) -> Stat | None:
    """What the kernel says of a process, None if there is none of this pid."""
    try:
        # The name in parentheses may hold spaces; the fields behind it may not.
        state, *numbers = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return Stat(state, *map(int, numbers[:3]), int(numbers[18]) * TICK_S)


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _model(pid: int) -> str | None:
    """The model of a stub, from its command line: stub, <repository>/<model>/<version>/model.py, ..., its instance's name, ...

    The one that only completes a configuration, and then ends, has the model's name there.
    """
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    if len(words) <= INSTANCE:
        return None
    path, instance = Path(os.fsdecode(words[1])), os.fsdecode(words[INSTANCE])
    model = path.parent.parent.name
    return model if path.name == "model.py" and instance != model else None
