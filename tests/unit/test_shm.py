"""Transport ``shm``: KV lies in files that outlive neither their lease, their release, nor their publisher."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from sun.handoff import shm as shm_module
from sun.handoff.shm import Shm, default_root, published
from sun.handoff.ticket import Ticket, TicketError, describe, parse

from .harness import eventually
from .test_ticket import BASE, KV, TASK, TICKET, TOKENS


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "kv"


@pytest.fixture
def owner(root):
    owner = Shm(root, publisher=True)
    yield owner
    owner.close()


def ship(owner: Shm, kv: bytes = KV, tokens: int = TOKENS) -> list[bytes]:
    publication = owner.reserve(len(kv))
    publication.buffer[:] = kv
    return publication.ship(lambda buffer, transport, location: describe(BASE, TASK, tokens, buffer, transport, location))


def pull(reader: Shm, shipment: list[bytes]) -> bytes:
    with reader.pull(parse(shipment[0]), shipment) as buffer:
        return bytes(buffer)


def kv_file(owner: Shm, shipment: list[bytes]) -> Path:
    return owner.root / parse(shipment[0]).location


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def at(location: str) -> Ticket:
    return msgspec.structs.replace(TICKET, transport="shm", location=location)


def test_another_opener_of_the_root_pulls_what_was_written(owner, root):
    shipment = ship(owner)
    assert len(shipment) == 1 and parse(shipment[0]).transport == "shm"
    assert pull(Shm(root), shipment) == KV


def test_the_empty_kv_of_a_one_token_prompt_travels(owner, root):
    assert pull(Shm(root), ship(owner, b"", 0)) == b""


def test_nobody_else_may_read_the_kv(owner, root):
    path = kv_file(owner, ship(owner))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == stat.S_IMODE(root.stat().st_mode) == 0o700


def test_a_root_of_another_user_is_refused(root, monkeypatch):
    root.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: root.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="SUN_SHM"):
        Shm(root)


def test_the_environment_says_where_kv_lies(monkeypatch, root):
    monkeypatch.setenv("SUN_SHM", str(root))
    assert default_root() == root
    monkeypatch.delenv("SUN_SHM")
    assert default_root().parent == Path("/dev/shm")


def test_a_released_ticket_is_gone_and_may_be_released_again(owner, root):
    shipment, reader = ship(owner), Shm(root)
    path = kv_file(owner, shipment)
    for _ in range(2):
        reader.release(parse(shipment[0]))
        reader.renew(parse(shipment[0]))
        assert not path.exists()
    with pytest.raises(TicketError, match=r"^ticket\.location: .* is gone"):
        pull(reader, shipment)


def test_kv_that_was_pulled_before_its_release_stays_readable(owner, root):
    shipment, reader = ship(owner), Shm(root)
    with reader.pull(parse(shipment[0]), shipment) as buffer:
        reader.release(parse(shipment[0]))
        assert bytes(buffer) == KV


def test_a_lease_that_ran_out_deletes_the_kv_and_no_other(owner):
    old, new = ship(owner), ship(owner)
    age(kv_file(owner, old), owner.lease_s + 1)
    age(kv_file(owner, new), owner.lease_s - 30)
    assert owner.expire() <= 1  # the owner's own thread may have been first
    assert not kv_file(owner, old).exists() and kv_file(owner, new).exists()


def test_a_renewed_lease_keeps_the_kv(owner, root):
    shipment = ship(owner)
    age(kv_file(owner, shipment), owner.lease_s - 5)
    Shm(root).renew(parse(shipment[0]))
    assert time.time() - kv_file(owner, shipment).stat().st_mtime < owner.lease_s - 5
    owner.expire()
    assert pull(Shm(root), shipment) == KV


def test_a_lease_begins_when_the_kv_is_shipped(owner):
    publication = owner.reserve(len(KV))
    path = owner.root / publication.location
    age(path, owner.lease_s - 5)
    publication.ship(lambda buffer, transport, location: describe(BASE, TASK, TOKENS, buffer, transport, location))
    assert time.time() - path.stat().st_mtime < owner.lease_s - 5


def test_the_owner_ends_leases_by_itself(root):
    owner = Shm(root, publisher=True, lease_s=0.02)
    path = kv_file(owner, ship(owner))
    eventually(lambda: not path.exists())
    owner.close()


def test_a_dropped_publication_leaves_nothing(owner):
    publication = owner.reserve(100)
    assert len(list(owner.owner.iterdir())) == 2
    publication.drop()
    assert [entry.name for entry in owner.owner.iterdir()] == [".lock"]


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


def test_no_lease_ends_before_it_begins(owner):
    publication = owner.reserve(len(KV))
    publication.buffer[:] = KV
    age(owner.root / publication.location, 1e6)  # a prompt that takes its time
    assert owner.expire() == 0
    shipment = publication.ship(lambda buffer, transport, location: describe(BASE, TASK, TOKENS, buffer, transport, location))
    assert pull(owner, shipment) == KV
    age(owner.root / publication.location, 1e6)
    eventually(lambda: not (owner.root / publication.location).exists())


def test_closing_leaves_other_owners_kv(root, owner):
    other = Shm(root, publisher=True)
    shipment = ship(owner)
    other.close()
    assert pull(Shm(root), shipment) == KV and len(list(root.iterdir())) == 1


def test_only_a_publisher_reserves(root):
    with pytest.raises(RuntimeError, match="publisher"):
        Shm(root).reserve(1)


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


OUTSIDE = ["", "../secret", "/etc/passwd", "..", ".", "a/b", f"{'a' * 32}/../{'b' * 32}", f"{'a' * 32}/.lock", f"{'A' * 32}/{'b' * 32}",
           f"{'a' * 32}/{'b' * 32}\n", f"{'a' * 32}/{'b' * 31}\x00", f"{'a' * 32}/{'b' * 32}/x"]


@pytest.mark.parametrize("location", OUTSIDE)
def test_a_location_outside_is_refused_by_all_who_would_open_it(owner, root, location):
    secret = root.parent / "secret"
    secret.write_text("secret")
    ticket = at(location)
    for call in (lambda: owner.pull(ticket, []).__enter__(), lambda: owner.renew(ticket), lambda: owner.release(ticket)):
        with pytest.raises(TicketError, match=r"^ticket\.location: "):
            call()
    assert secret.read_text() == "secret"


def test_a_link_in_place_of_the_kv_is_not_followed(owner, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(KV)
    name = "b" * 32
    (owner.owner / name).symlink_to(secret)
    with pytest.raises(OSError), owner.pull(at(f"{owner.owner.name}/{name}"), []):
        pass


def test_without_room_the_reservation_fails_and_leaves_nothing(owner, monkeypatch):
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shm_module.os, "posix_fallocate", full)
    with pytest.raises(OSError) as error:
        owner.reserve(1000)
    assert error.value.errno == errno.ENOSPC
    assert [entry.name for entry in owner.owner.iterdir()] == [".lock"]


def test_reserved_room_is_taken_at_once(owner):
    publication = owner.reserve(1 << 20)
    assert (owner.root / publication.location).stat().st_blocks * 512 >= 1 << 20
    publication.drop()


def test_an_owner_has_no_more_outstanding_than_its_limit_until_some_is_released(root):
    owner = Shm(root, publisher=True, most=3 * mmap.PAGESIZE)
    shipments = [ship(owner) for _ in range(3)]  # a page each, though the KV is smaller
    with pytest.raises(OSError, match=rf"max_ticket_tokens: {3 * mmap.PAGESIZE} bytes .* are over the limit of {3 * mmap.PAGESIZE}") as error:
        owner.reserve(1)
    assert error.value.errno == errno.EDQUOT
    Shm(root).release(parse(shipments[0][0]))
    ship(owner)
    with pytest.raises(OSError, match="max_ticket_tokens"):
        ship(owner, b"", 0)
    for path in published(root)[:2]:
        age(path, 1e4)
    assert owner.expire() == 2
    owner.reserve(2 * mmap.PAGESIZE).drop()
    owner.reserve(2 * mmap.PAGESIZE)
    owner.close()
