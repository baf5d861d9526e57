"""The soak's shorter form, a quarter of a minute of everything at once, but for kills: `test_faults` has those.

Where this user may mount, the KV has 64 MB, as Docker gives /dev/shm, and the disk of the server's log is full.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sun_client.client import SunClient
from sun_client.doctor import Doctor
from sun_client.errors import SunError
from sun_client.root import Root
from sun_client.server import Server
from sun_perf.soak import Soak
from tests.server.conftest import GREEDY, free_ports
from tests.unit.harness import disk


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with pytest.raises(OSError, match="No space left"), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1000))


class Scarce:
    """A server that has to do with little; mounted: or as much as there is."""

    def __init__(self, server: Server, mounted: bool):
        self.server, self.mounted = server, mounted


@pytest.fixture(scope="module")
def scarce(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scarce]:
    """A server of its own for the tests of this file, on the repository of all."""
    place = tmp_path_factory.mktemp("scarce")
    for name in ("model_repository", "backends", "build"):
        (place / name).symlink_to(root / name)
    for name in (".run", "shm"):
        (place / name).mkdir()
    with ExitStack() as stack:
        mounted = stack.enter_context(disk(place / ".run", "4m")) and stack.enter_context(disk(place / "shm", "64m"))
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("SUN_SHM", str(place / "shm" / "kv"))
        with Server(place, free_ports()) as server:
            if mounted:
                fill(place / ".run" / "fill")
            yield Scarce(server, mounted)
            server.stop(drain_s=0)
        assert server.leftovers() == []


def test_under_mixed_load_every_answer_is_right_and_nothing_is_left(scarce):
    said = []
    soak = Soak(scarce.server, ["bash", "identity"], said.append)
    soak.refer()
    report = soak.run(8.0, kill_every=1e6)
    assert report["wrong"] == [] and said == []
    assert report["idle_at_the_end"]
    assert report["counts"]["answered"] > 5 and report["counts"].keys() == {"answered", "cancelled", "out of time", "refused"}


def test_a_prompt_that_finds_no_room_in_shared_memory_fails_alone(scarce):
    if not scarce.mounted:
        pytest.skip("needs the right to mount a small disk")
    with SunClient(f"127.0.0.1:{scarce.server.ports.grpc}") as client:
        other = client.stream("bash", "find big files", sampling={"max_tokens": 400, "ignore_eos": True})
        next(other)
        with pytest.raises(SunError, match=r"no room for the KV of \d+ tokens \(shm\): No space left on device"):
            client.generate("bash", "hello " * 1500, sampling=GREEDY)
        assert client.generate("bash", "hello", sampling=GREEDY).text and next(other).token_ids
    (finding,) = Doctor(Root(scarce.server.root)).shared_memory()
    assert finding.state == "warning" and "set SUN_SHM" in finding.advice
