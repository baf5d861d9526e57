"""What memory there is: the kernel's account, or a container's limit where that is less."""

from __future__ import annotations

import pytest

from sun import memory


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 1000 KiB available, and a function that puts it into a container."""
    (tmp_path / "meminfo").write_text("MemTotal:        4000 kB\nMemAvailable:    1000 kB\nHugePages_Total:       0\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)

    def contain(limit: str, used: int, cached: int) -> None:
        for name, text in {"max": limit, "current": used, "stat": f"anon 5\ninactive_file {cached}\n"}.items():
            (tmp_path / f"memory.{name}").write_text(f"{text}\n" if name != "stat" else text)

    return contain


def test_without_a_container_it_is_what_the_kernel_says(machine):
    assert memory.available() == 1000 * 1024


@pytest.mark.parametrize(("limit", "used", "cached", "free"), [
    ("max", 50, 0, 1_024_000), ("500000", 200_000, 0, 300_000), ("500000", 200_000, 50_000, 350_000), ("500000", 600_000, 0, 0), ("99999999", 0, 0, 1_024_000),
])
def test_in_a_container_it_is_what_its_limit_leaves(machine, limit, used, cached, free):
    machine(limit, used, cached)
    assert memory.available() == free


def test_this_machine_has_some():
    assert memory.available() > 0
