"""What `sun serve` says of the machine before it starts a server."""

from __future__ import annotations

import pytest

from sun_client import show
from sun_client.cli_serve import serve
from sun_client.errors import ServerError


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """A function: `sun serve` on a root with this base, or none, whose server does not start; what was said before it would have."""
    said = []

    def fail(server):
        said.append(capsys.readouterr().err)
        raise ServerError("does not start")

    monkeypatch.setattr(show, "start", fail)
    (tmp_path / "model_repository").mkdir()

    def run(base=None) -> str:
        if base is not None:
            (tmp_path / "build").mkdir()
            (tmp_path / "build" / "base").symlink_to(base)
        with pytest.raises(ServerError, match="does not start"):
            serve(tmp_path)
        return said[0]

    return run


@pytest.mark.parametrize("free, lines", [(1000, 1), (1 << 40, 0)])
def test_too_little_shared_memory_is_said_before_the_start(start, base_dir, monkeypatch, free, lines):
    monkeypatch.setattr("sun.handoff.shm.room", lambda place: (free, 0))
    assert [line[:24] for line in start(base_dir).splitlines()] == ["Warning: shared memory: "] * lines


def test_what_is_wrong_with_the_base_is_the_starts_to_say(start):
    assert start() == ""
