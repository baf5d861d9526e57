"""What Triton's processes keep in /dev/shm is for their own user alone."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import uuid
from collections.abc import Iterator

import pytest

from sun_client import shm

MAPS = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
mapped = mmap.mmap(fd, 4096)
os.close(fd)
print(flush=True)
sys.stdin.read()
"""
OPENS = """
import os, sys
os.setuid(int(sys.argv[2]))
os.close(os.open(sys.argv[1], os.O_RDWR))
"""


@pytest.fixture
def held() -> Iterator[tuple[int, dict[str, str]]]:
    """A session whose processes have two files mapped, readable for all as Triton makes them: a region and somebody else's."""
    names = {"region": f"triton_sun_test_backend_shm_region_{uuid.uuid4()}", "other": f"sun-test-{uuid.uuid4()}"}
    for name in names.values():
        (shm.SHM / name).write_bytes(bytes(4096))
        (shm.SHM / name).chmod(0o644)
    command = f"{sys.executable} -c '{MAPS}' {shm.SHM / names['other']} & exec {sys.executable} -c '{MAPS}' {shm.SHM / names['region']}"
    process = subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        process.stdout.read(2)
        yield process.pid, names
    finally:
        process.communicate()
        for name in names.values():
            (shm.SHM / name).unlink(missing_ok=True)


def mode(name: str) -> int:
    return stat.S_IMODE((shm.SHM / name).stat().st_mode)


def opens(name: str, uid: int) -> bool:
    """Whether a process of this user can open the file."""
    return subprocess.run([sys.executable, "-c", OPENS, shm.SHM / name, str(uid)], stderr=subprocess.DEVNULL).returncode == 0


def test_a_servers_regions_are_for_its_user_alone_and_no_other_file_is_touched(held):
    session, names = held
    shm.keep_private(shm.session_files(session) | {f"triton_sun_test_backend_shm_region_{uuid.uuid4()}"})
    assert mode(names["region"]) == 0o600 and mode(names["other"]) == 0o644
    assert opens(names["region"], os.getuid()), "the server's next process must"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
def test_another_user_cannot_open_a_region_and_one_that_is_his_is_left_alone(held):
    session, names = held
    os.chown(shm.SHM / names["region"], 65534, 65534)
    shm.keep_private({names["region"]})
    assert mode(names["region"]) == 0o644
    os.chown(shm.SHM / names["region"], 0, 0)
    shm.keep_private(shm.session_files(session))
    assert not opens(names["region"], 65534)


def test_a_link_with_a_regions_name_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(shm, "SHM", tmp_path)
    (tmp_path / "mine").touch(mode=0o644)
    link = f"triton_python_backend_shm_region_{uuid.uuid4()}"
    (tmp_path / link).symlink_to(tmp_path / "mine")
    shm.keep_private({link})
    assert mode("mine") == 0o644
