"""The supervisor heals what dies for as long as it takes, and says each time what it sees; without a server, and without waiting."""

from __future__ import annotations

from pathlib import Path

import pytest

from sun_client import supervisor as module
from sun_client.errors import ServerError
from sun_client.server import HOST, Ports
from sun_client.supervisor import BACKOFF_S, HEALTHY_S, HUNG_S, SETTLE_S, Supervisor

MODEL = "prefill_bash"


class World:
    """A server, its control, its models' processes and the time, as far as a supervisor sees them.

    bad_loads, bad_starts: how many of the next fail; short: how many of the next loaded processes die at once.
    """

    http_host, ports = HOST, Ports()

    def __init__(self, root: Path):
        self.root, self.pid, self.running, self.ready = root, 1, True, True
        for model in ("sun", MODEL):
            (root / "model_repository" / model).mkdir(parents=True)
        self.processes: dict[str, frozenset[int]] = {"sun": frozenset((10,)), MODEL: frozenset((11,))}
        self.dead: frozenset[int] = frozenset()
        self.bad_loads = self.bad_starts = self.short = 0
        self.done: list[str] = []
        self.slept: list[float] = []
        self.now = 1000.0

    # The server.
    @property
    def control(self):
        return Control(self)

    def poll(self):
        if not self.running:
            raise ServerError("tritonserver was killed by signal 9")

    def remember(self):
        pass

    def stop(self, drain_s):
        self.running = False

    def start(self):
        if self.bad_starts:
            self.bad_starts -= 1
            raise ServerError("tritonserver ended with code 1")
        self.pid, self.running, self.ready, self.dead = self.pid + 1, True, True, frozenset()
        self.processes = {"sun": frozenset((10 * self.pid,)), MODEL: frozenset((10 * self.pid + 1,))}

    # Its processes.
    def models(self):
        return {model: pids - self.dead for model, pids in self.processes.items() if pids - self.dead}

    def killed(self, pids):
        return pids & self.dead

    def stopped(self, pids):
        return frozenset()

    def kill(self, model, pids):
        self.dead |= pids

    # The time.
    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept.append(seconds)


class Control:
    """Control of the world's server of now."""

    def __init__(self, world: World):
        self._world, self.pid = world, world.pid

    def unload(self, model):
        self._world.done.append("unload")
        self._world.dead -= self._world.processes.pop(model, frozenset())  # Triton waits for it

    def load(self, model):
        self._world.done.append("load")
        if self._world.pid != self.pid:
            raise ServerError(f"{model}: the key is another server's")
        if self._world.bad_loads:
            self._world.bad_loads -= 1
            raise ServerError(f"{model}: no memory")
        if self._world.short:
            self._world.short -= 1
        else:
            self._world.processes.setdefault(model, frozenset((len(self._world.done) + 100,)))


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    world = World(tmp_path)
    monkeypatch.setattr(module, "Stubs", lambda pid: world)
    monkeypatch.setattr(module, "time", world)
    monkeypatch.setattr(module, "answers", lambda host, port: world.ready)
    return world


@pytest.fixture
def said() -> list[str]:
    """What the supervisor says."""
    return []


@pytest.fixture
def supervisor(world, said) -> Supervisor:
    return Supervisor(world, said.append)


def heal(supervisor: Supervisor, world: World) -> None:
    """Kill the model's process, and wait until the supervisor has done with it."""
    done = list(world.done)
    world.kill(MODEL, world.processes[MODEL])
    supervisor.look()
    assert world.done == done, "once, it may be one that the server ends"
    supervisor.look()
    for thread in list(supervisor._healing.values()):
        thread.join()
    supervisor.look()


@pytest.mark.parametrize("failures", [0, 1, 6, 7, 9])
@pytest.mark.parametrize("how", ["bad_loads", "short"])
def test_a_dead_model_is_loaded_until_it_serves_again(supervisor, world, said, failures, how):
    setattr(world, how, failures)
    heal(supervisor, world)
    pauses = [*BACKOFF_S, *[BACKOFF_S[-1]] * 9][:failures]
    assert world.slept == [SETTLE_S, *pauses] and world.models()[MODEL]
    words = "no memory" if how == "bad_loads" else "its process died at once"
    assert said == [f"model {MODEL}: its process died; loading it anew",
                    *(f"model {MODEL}: could not be loaded anew: {MODEL}: {words}; next try in {pause:g} s" for pause in pauses),
                    f"model {MODEL}: serves again, after {SETTLE_S + sum(pauses):.1f} s"]
    heal(supervisor, world)
    assert said[-1].endswith(f"serves again, after {SETTLE_S:.1f} s"), "and the next time it dies"


def test_a_dead_model_that_is_removed_meanwhile_is_let_be(supervisor, world, said, monkeypatch):
    world.bad_loads = 3
    monkeypatch.setattr(world, "sleep", lambda seconds: world.bad_loads == 2 and (world.root / "model_repository" / MODEL).rmdir())
    heal(supervisor, world)
    assert said[-1] == f"model {MODEL}: has been removed" and world.done.count("load") == 2


def test_a_dead_model_is_left_to_a_server_that_was_started_meanwhile(supervisor, world, said, monkeypatch):
    world.bad_loads = 3
    monkeypatch.setattr(world, "sleep", lambda seconds: world.bad_loads == 2 and world.start())
    heal(supervisor, world)
    assert said[-1].endswith("no memory; next try in 1 s") and world.done.count("load") == 2


def test_what_somebody_else_has_loaded_meanwhile_is_not_unloaded(supervisor, world, said, monkeypatch):
    world.bad_loads = 1
    monkeypatch.setattr(world, "sleep", lambda seconds: world.bad_loads or world.processes.update({MODEL: frozenset((7,))}))
    heal(supervisor, world)
    assert world.done == ["unload", "load", "load"] and world.models()[MODEL] == {7} and "serves again" in said[-1]


def test_a_dead_server_starts_again_the_later_the_sooner_it_died_again_and_at_once_after_a_healthy_while(supervisor, world, said):
    for pause in (*BACKOFF_S, BACKOFF_S[-1]):
        world.running = False
        supervisor.look()
        assert world.running and world.slept[-1] == pause
        assert said[-3:] == ["tritonserver was killed by signal 9", f"starting the server anew in {pause:g} s", "the server serves again"]
    world.now += HEALTHY_S + 1
    world.running = False
    supervisor.look()
    assert world.slept[-1] == BACKOFF_S[0] and world.pid == len(BACKOFF_S) + 3


def test_a_start_that_fails_is_tried_until_one_does_not(supervisor, world, said):
    world.running, world.bad_starts = False, 9
    supervisor.look()
    assert world.running and world.slept == [*BACKOFF_S, *[BACKOFF_S[-1]] * 3]
    assert said.count("tritonserver ended with code 1") == 9 and said[-1] == "the server serves again"
    heal(supervisor, world)
    assert "serves again" in said[-1], "it is watched"


def test_the_routers_death_is_the_servers(supervisor, world, said):
    world.kill("sun", world.processes["sun"])
    supervisor.look()
    supervisor.look()
    assert world.pid == 2 and said[0] == "the router's process died: its streams would never end"


@pytest.mark.parametrize("ready", [None, False])
def test_a_server_that_says_nothing_for_long_hangs_and_one_that_loads_does_not(supervisor, world, said, ready):
    world.ready = ready
    world.now += HUNG_S
    supervisor.look()
    assert said == []
    world.now += 1
    supervisor.look()
    assert world.pid == (2 if ready is None else 1)
    assert said[:1] == ([f"tritonserver has not answered for {HUNG_S:g} s"] if ready is None else [])
