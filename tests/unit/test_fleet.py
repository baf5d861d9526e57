"""A decode worker that does not answer its heartbeat is given up, and killed only if somebody has stopped it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from sun.router.errors import Gone


@pytest.fixture
def fleet(monkeypatch):
    """Triton's fleet, whose calls get no answer, with a process that is stopped, or not; it notes who is killed."""
    triton = ModuleType("triton_python_backend_utils")
    triton.Tensor = lambda name, values: None
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    from sun_router.fleet import BlsFleet

    fleet = BlsFleet()
    monkeypatch.setattr(fleet, "_calls", Silent())
    fleet._stubs = Stubs()
    yield fleet
    for name in ("sun_router.fleet", "sun_router.calls"):
        sys.modules.pop(name, None)


class Silent:
    """Calls that get no answer."""

    def call(self, model, tensor, output, timeout):
        raise Gone(f"{model}: no answer for {timeout:g} s")


class Stubs:
    """One process, 7, for each model."""

    stops: frozenset[int] = frozenset()
    killed: frozenset[int] = frozenset()

    def pids(self, model: str) -> frozenset[int]:
        return frozenset({7})

    def stopped(self, pids: frozenset[int]) -> frozenset[int]:
        return pids & self.stops

    def kill(self, model: str, pids: frozenset[int]) -> None:
        self.killed |= pids


@pytest.mark.parametrize("stopped", [frozenset(), frozenset({7})])
def test_a_silent_workers_process_is_killed_if_it_is_stopped_and_left_alone_if_it_runs(fleet, stopped):
    fleet._stubs.stops = stopped
    with pytest.raises(Gone, match="no answer for 1.5 s"):
        fleet.stats("decode_0")
    assert fleet._stubs.killed == stopped
