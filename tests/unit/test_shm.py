"""Transport ``shm``: KV lies in files that outlive neither their lease, their release, nor their publisher."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from sun.handoff import shm as shm_module
from sun.handoff.shm import Shm, default_root, published
from sun.handoff.ticket import Ticket, TicketError, describe, parse

from .harness import disk, eventually
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


def test_no_lease_ends_before_it_begins(owner):
    publication = owner.reserve(len(KV))
    publication.buffer[:] = KV
    age(owner.root / publication.location, 1e6)  # a prompt that takes its time
    assert owner.expire() == 0
    shipment = publication.ship(lambda buffer, transport, location: describe(BASE, TASK, TOKENS, buffer, transport, location))
    assert pull(owner, shipment) == KV
    age(owner.root / publication.location, 1e6)
    eventually(lambda: not (owner.root / publication.location).exists())


def test_only_a_publisher_reserves(root):
    with pytest.raises(RuntimeError, match="publisher"):
        Shm(root).reserve(1)


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


def test_kv_leaves_triton_room_on_the_file_system(tmp_path):
    with disk(tmp_path, "8m") as mounted:
        if not mounted:
            pytest.skip("needs the right to mount a small disk")
        owner = Shm(tmp_path / "kv", publisher=True)
        owner.reserve(6 << 20)
        with pytest.raises(OSError, match=r"No space left on device: 2097152 bytes are more than the \d+ that are free, beside 1048576 kept") as error:
            owner.reserve(2 << 20)
        assert error.value.errno == errno.ENOSPC and len(published(owner.root)) == 1
        owner.reserve(1 << 19)
        owner.close()


@pytest.mark.parametrize("blocks, free, fits", [(2048, 512, False), (2048, 768, True), (1 << 20, 4096 + 511, False), (1 << 20, 4096 + 512, True), (0, 0, True)])
def test_what_is_kept_for_triton_is_an_eighth_or_16_mib_and_nothing_where_there_is_no_limit(owner, monkeypatch, blocks, free, fits):
    monkeypatch.setattr(shm_module.os, "statvfs", lambda place: SimpleNamespace(f_blocks=blocks, f_bavail=free, f_frsize=4096))
    if fits:
        return owner.reserve(2 << 20).drop()
    with pytest.raises(OSError, match="No space left on device"):
        owner.reserve(2 << 20)


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
