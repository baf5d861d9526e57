"""Replacing the decode module of a running server, worker by worker, so that one always serves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from sun.messages import Stats
from sun_build.config_file import set_parameter, write_whole
from sun_client.control import Control
from sun_client.errors import ServerError

LOOK_S = 0.2
BACK_S = 1.0
"""After a worker's load, before the next one drains: the router's heartbeat, twice a second, must find it."""
EVICTED_S = 30.0
"""Dropped sequences leave with the end of a step."""


class Replacement:
    """values: parameters to set in the workers' config.pbtxt, the empty string to take one away; none only loads what is there anew.

    configs: by worker. grace_s: how long a worker's sequences may take to end; what is left then goes on with other workers of the
    same module, and fails where there is none: no answer is of two modules. say: told of each step.
    """

    def __init__(self, control: Control, configs: dict[str, Path], values: dict[str, str], grace_s: float, say: Callable[[str], None]):
        self._control, self._configs, self._values = control, configs, values
        self._grace_s, self._say = grace_s, say

    def run(self) -> None:
        """Replace one after the other. Raises ServerError at the first that cannot be, with that one as it was before."""
        done: list[str] = []
        for worker in self._configs:
            try:
                self._check_others(worker)
                self._replace(worker)
            except ServerError as error:
                raise ServerError(f"{error}; replaced before it: {', '.join(done) or 'none'}") from error
            done.append(worker)

    def _state(self, worker: str) -> Stats | None:
        """None if it is not loaded, or does not answer."""
        try:
            return self._control.stats(worker)
        except ServerError:
            return None

    def _check_others(self, worker: str) -> None:
        states = [self._state(other) for other in self._configs if other != worker]
        if not any(state is not None and not state.draining for state in states):
            raise ServerError(f"{worker}: no other decode worker serves, so that nobody would while it is replaced; "
                              "add one (README, Settings), or start the server anew")

    def _replace(self, worker: str) -> None:
        config = self._configs[worker]
        began, before = time.monotonic(), config.read_text()
        try:
            self._drain(worker)
            for name, value in self._values.items():
                set_parameter(config, name, value)
            self._load(worker)
        except (ServerError, OSError) as error:
            self._restore(worker, before)
            raise ServerError(f"{error}; {worker} serves as before") from error
        except BaseException:  # an interrupt
            self._restore(worker, before)
            raise
        self._say(f"{worker}: {self._control.stats(worker).shown_module}, after {time.monotonic() - began:.1f} s")
        time.sleep(BACK_S)

    def _drain(self, worker: str) -> None:
        """Until it has no sequence; one that is not loaded has none."""
        if (state := self._state(worker)) is None:
            return
        self._say(f"{worker}: drains, {state.running + state.waiting} sequences")
        self._control.drain(worker)
        if self._idle(worker, self._grace_s):
            return
        left = self._control.stats(worker)
        self._say(f"{worker}: {left.running + left.waiting} sequences did not end within {self._grace_s:g} s; they go to workers of the same module, or fail")
        self._control.drain(worker, evict=True)
        if not self._idle(worker, EVICTED_S):
            raise ServerError(f"{worker}: still has sequences")

    def _idle(self, worker: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not self._control.stats(worker).idle:
            if time.monotonic() > end:
                return False
            time.sleep(LOOK_S)
        return True

    def _load(self, worker: str) -> None:
        # Not over the old one, which load alone would do: that takes twice the memory, and the worker's process must be one.
        self._control.unload(worker)
        self._control.load(worker)

    def _restore(self, worker: str, before: str) -> None:
        config = self._configs[worker]
        if config.read_text() == before:
            with contextlib.suppress(ServerError):
                self._control.drain(worker, on=False)
                return
        write_whole(config, before)
        self._load(worker)
