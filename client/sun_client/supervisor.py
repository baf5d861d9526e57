"""What keeps a server serving: models whose process died or was stopped are loaded anew, and so is a server that died or hangs."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

from sun.stubs import Stubs
from sun_client.errors import ServerError
from sun_client.server import Server, answers

HUNG_S = 30.0
"""A server that does not say for so long whether it is ready hangs. While a model is being loaded it says that it is not."""
SETTLE_S = 2.0
"""Before a dead model is unloaded: Triton takes a second to fail the calls that its process had, and they still need the model."""
ROUTER = "sun"
"""Its clients' streams are Triton's, which never ends those of a process that died: only the server's own end does."""
BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 60.0)
"""Seconds before the server's next start, the longer the sooner it died again, and before the next try to load a model; the last for all that follow."""
HEALTHY_S = 120.0
"""A server that ran for so long starts again at once, should it die."""


class Supervisor:
    """Watches a running server; call `look` about twice a second, from the thread that started it.

    say: called with one line for whoever is on call.
    """

    def __init__(self, server: Server, say: Callable[[str], None]):
        self._server, self._say = server, say
        self._failures = 0
        self._watch()

    def look(self) -> None:
        """See what has died since, and heal it. Blocks while the server itself is started anew. Raises nothing but an interrupt."""
        try:
            self._server.poll()
        except ServerError as error:
            return self._restart(str(error))
        before, self._killed = self._killed, frozenset()
        stopped, self._stopped = self._stopped, frozenset()
        for model, pids in list(self._known.items()):
            self._stopped |= self._stubs.stopped(pids)
            # Going on would be worse, see `sun_router.calls.Calls`.
            self._stubs.kill(model, pids & stopped & self._stopped)
            killed = self._stubs.killed(pids)
            self._killed |= killed
            # Twice in a row: one that the server has ended itself is also seen so, for a moment.
            if model not in self._healing and killed & before:
                if model == ROUTER:
                    return self._restart("the router's process died: its streams would never end")
                self._say(f"model {model}: its process died; loading it anew")
                self._healing[model] = threading.Thread(target=self._heal, args=(model,), daemon=True)
                self._healing[model].start()
        for model, thread in list(self._healing.items()):
            if not thread.is_alive():
                del self._healing[model]
        for model, pids in self._stubs.models().items():
            if model not in self._healing:
                self._known[model] = pids | self._stubs.killed(self._known.get(model, frozenset()))
        self._look_for_a_hang()

    def _watch(self) -> None:
        """Begin to watch a server that has just become ready."""
        self._stubs = Stubs(self._server.pid)
        self._known, self._killed, self._stopped = self._stubs.models(), frozenset(), frozenset()
        self._healing: dict[str, threading.Thread] = {}
        self._started = self._answered = time.monotonic()

    def _heal(self, model: str) -> None:
        began, control = time.monotonic(), self._server.control
        time.sleep(SETTLE_S)
        for failures in itertools.count():
            try:
                if not failures or not self._stubs.models().get(model):  # else somebody has loaded it meanwhile
                    control.unload(model)
                control.load(model)
                self._server.remember()
                # Now, for a process that dies before the next look.
                self._known[model] = self._stubs.models().get(model, frozenset())
                if not self._known[model]:
                    raise ServerError(f"{model}: its process died at once")
            except ServerError as error:
                if self._server.pid != control.pid or not self._server.running:
                    return  # a new server has it already, or will
                if not (self._server.root / "model_repository" / model).is_dir():
                    return self._say(f"model {model}: has been removed")
                pause = backoff(failures)
                self._say(f"model {model}: could not be loaded anew: {error}; next try in {pause:g} s")
                time.sleep(pause)
            else:
                return self._say(f"model {model}: serves again, after {time.monotonic() - began:.1f} s")

    def _look_for_a_hang(self) -> None:
        if answers(self._server.http_host, self._server.ports.http) is not None:
            self._answered = time.monotonic()
        elif time.monotonic() - self._answered > HUNG_S:
            self._restart(f"tritonserver has not answered for {HUNG_S:g} s")

    def _restart(self, why: str) -> None:
        self._say(why)
        self._failures = 0 if time.monotonic() - self._started > HEALTHY_S else self._failures
        while True:
            self._server.stop(drain_s=0)
            pause = backoff(self._failures)
            self._failures += 1
            self._say(f"starting the server anew in {pause:g} s")
            time.sleep(pause)
            try:
                self._server.start()
            except (ServerError, OSError) as error:
                self._say(str(error))
            else:
                self._say("the server serves again")
                return self._watch()


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures before this one."""
    return BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
