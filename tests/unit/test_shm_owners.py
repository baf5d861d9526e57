"""Owners of KV come, go and die: what each leaves goes when nobody needs it, and nothing else does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sun.handoff import shm as shm_module
from sun.handoff.shm import Shm
from sun.handoff.ticket import TicketError, parse

from .harness import eventually
from .test_shm import age, kv_file, owner, pull, root, ship  # owner and root are fixtures
from .test_ticket import KV


def test_closing_leaves_nothing(root):
    owner = Shm(root, publisher=True)
    Shm(root).release(parse(ship(owner)[0]))
    owner.reserve(10)
    owner.close()
    owner.close()
    assert not root.exists()


@pytest.mark.parametrize("killed", [False, True])
def test_kv_outlives_its_owner_for_as_long_as_it_is_leased(root, killed):
    owner = Shm(root, publisher=True)
    shipments = [ship(owner) for _ in range(2)]
    paths = [kv_file(owner, shipment) for shipment in shipments]
    if killed:
        owner._stop.set()
        os.close(owner._lock)  # as the kernel does
    else:
        owner.close()
    reader = Shm(root)
    age(paths[0], 50)
    reader.sweep()
    reader.renew(parse(shipments[0][0]))
    age(paths[1], 61)
    assert reader.sweep() == 0 and not paths[1].exists()
    assert pull(reader, shipments[0]) == KV and not reader.lives(paths[0].parent.name)
    age(paths[0], 61)
    assert reader.sweep() == 1
    reader.close()
    assert not root.exists()


def test_a_server_that_ends_waits_for_no_lease_of_its_own_and_leaves_all_others_alone(root, owner, monkeypatch):
    servers = ["0123456789abcdef", "fedcba9876543210"]
    shipments = [ship(owner)]
    for server in servers:
        monkeypatch.setenv("SUN_SHM_SERVER", server)
        dead = Shm(root, publisher=True)
        assert dead.owner.name.endswith(server)
        shipments.append(ship(dead))
        dead.close()
    reader = Shm(root)
    assert reader.sweep(servers[0]) == 1
    assert pull(reader, shipments[0]) == pull(reader, shipments[2]) == KV
    with pytest.raises(TicketError):
        pull(reader, shipments[1])


def test_a_servers_name_that_is_none_is_no_part_of_a_path(root, monkeypatch):
    monkeypatch.setenv("SUN_SHM_SERVER", "../../elsewhere")
    shm = Shm(root, publisher=True)
    assert shm.owner.parent == root and len(shm.owner.name) == 32
    shm.close()


def test_what_was_never_shipped_goes_with_its_owner(root):
    dead = Shm(root, publisher=True)
    dead.reserve(100)
    dead._stop.set()
    os.close(dead._lock)  # as the kernel does
    Shm(root)
    assert not dead.owner.exists()


def test_without_an_owner_nothing_is_ended(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ("a" * 32)).touch()
    shm = Shm(root, publisher=True)
    shm.close()
    shm.clear()
    assert shm.expire() == 0 and (tmp_path / ("a" * 32)).exists()


def test_many_that_open_and_close_at_once_do_not_hinder_each_other(root):
    def often(_: int) -> None:
        for _ in range(40):
            shm = Shm(root, publisher=True)
            ship(shm)
            shm.clear()
            shm.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(often, range(4)))
    assert not root.exists()


def test_cleared_kv_is_gone(owner):
    path = kv_file(owner, ship(owner))
    owner.clear()
    assert not path.exists() and owner.owner.exists()


def test_what_others_keep_in_the_root_is_left_alone(root):
    for name in ("photos", "x" * 32, "a" * 31):
        (root / name).mkdir(parents=True)
        (root / name / "mine").touch()
        age(root / name, 1e6)
    (root / ("c" * 32)).touch()
    (root / ("e" * 32) / "sub").mkdir(parents=True)
    (root / ("e" * 32) / "thumb.png").touch()
    elsewhere = root.parent / "elsewhere"
    (elsewhere / "mine").mkdir(parents=True)
    age(elsewhere, 1e6)
    (root / ("d" * 32)).symlink_to(elsewhere)
    Shm(root).sweep()
    assert len(list(root.iterdir())) == 6 and (elsewhere / "mine").exists() and len(list((root / ("e" * 32)).iterdir())) == 2


def test_a_root_that_is_a_link_is_only_followed_if_the_operator_says_so(root, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    root.symlink_to(tmp_path / "home")
    monkeypatch.delenv("SUN_SHM", raising=False)
    with pytest.raises(PermissionError, match="is a link"):
        Shm(root)
    monkeypatch.setenv("SUN_SHM", str(root))
    Shm(root)


def test_closing_leaves_other_owners_kv(root, owner):
    other = Shm(root, publisher=True)
    shipment = ship(owner)
    other.close()
    assert pull(Shm(root), shipment) == KV and len(list(root.iterdir())) == 1


PUBLISHER = """
import sys
from pathlib import Path
from sun.handoff.shm import Shm
shm = Shm(Path(sys.argv[1]), publisher=True)
shm.reserve(1000)
print(shm.owner.name, flush=True)
sys.stdin.read()
"""


def test_the_remains_of_a_killed_publisher_are_swept_and_those_of_living_ones_are_not(root):
    command = [sys.executable, "-c", PUBLISHER, str(root)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        dead, living = (root / process.stdout.readline().strip() for process in processes)
        reader = Shm(root)
        assert reader.sweep() == 0 and len(list(dead.iterdir())) == len(list(living.iterdir())) == 2
        os.kill(processes[0].pid, signal.SIGKILL)
        processes[0].wait()
        for path in [*dead.iterdir(), *living.iterdir()]:
            age(path, 61)
        # The living publisher's own thread sweeps too and may be first.
        assert reader.sweep() <= 1
        eventually(lambda: not dead.exists())
        assert len(list(living.iterdir())) == 2
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_new_opener_sweeps_what_dead_ones_left(root):
    dead = root / ("d" * 32)
    dead.mkdir(parents=True)
    (dead / ".lock").touch()
    (dead / ("f" * 32)).write_bytes(b"kv")
    age(dead / ("f" * 32), 61)
    Shm(root)
    assert not dead.exists()


def test_a_folder_that_is_still_being_made_is_not_swept_until_it_is_old(root):
    reader = Shm(root)
    folders = [root / f".new-{digit * 32}" for digit in "01"]
    for folder in folders:
        folder.mkdir()
    (folders[1] / ".lock").touch()  # its maker has not locked it yet
    reader.sweep()
    assert all(folder.exists() for folder in folders)
    for folder in folders:
        age(folder, 3600)
    reader.sweep()
    assert not any(folder.exists() for folder in folders)


def test_a_folder_that_vanishes_during_a_sweep_does_not_stop_it(root, monkeypatch):
    Shm(root)
    dead = [root / (digit * 32) for digit in "de"]
    for folder in dead:
        folder.mkdir()
        (folder / ".lock").touch()
    look = os.open

    def late(path, *args, **kwargs):
        if Path(path).parent == dead[0]:
            shutil.rmtree(dead[0], ignore_errors=True)  # listed, but gone when looked at
        return look(path, *args, **kwargs)

    monkeypatch.setattr(shm_module.os, "open", late)
    Shm(root)
    assert not dead[1].exists()


def test_a_root_that_vanishes_during_a_sweep_does_not_stop_it(root):
    reader = Shm(root)
    root.rmdir()  # the last owner closed
    assert reader.sweep() == 0
