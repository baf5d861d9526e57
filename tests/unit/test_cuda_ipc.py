"""Transport ``cuda_ipc``, with files in place of a GPU's memory: a ticket gives its own KV or an error that names it, whatever happens to others."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sun.handoff import cuda_driver
from sun.handoff.cuda_driver import CudaDriver
from sun.handoff.cuda_ipc import UNIT, CudaIpc, Lease
from sun.handoff.device import DeviceBuffer, DriverError
from sun.handoff.kv import kv_tensor, verified_kv
from sun.handoff.shm import Shm, published
from sun.handoff.ticket import Ticket, TicketError, describe, parse
from sun.handoff.transports import TRANSPORTS, publisher, why_not
from sun.prefill.engine import PrefillEngine
from sun.prefill.executors import load
from sun_client.doctor import Doctor
from sun_perf.gpu.stand_in import StandIn

from ..conftest import DEVICE
from .harness import PATIENCE_S, within
from .test_shm import age
from .test_ticket import BASE, GEOMETRY, TASK

TOKENS = 4
NBYTES = GEOMETRY.kv_bytes(TOKENS, 2)
"""One unit of room."""
assert NBYTES <= UNIT


class Host:
    """A folder with a publisher that has room for so many KV, and readers."""

    def __init__(self, folder: Path, room: int = 4):
        self.folder, self.shm = folder, folder / "shm"
        self.publisher = self.publishing(room)
        self.driver = StandIn(folder)
        self.reader = CudaIpc(Shm(self.shm), self.driver)

    def publishing(self, room: int = 4) -> CudaIpc:
        """One more publisher."""
        return CudaIpc(Shm(self.shm, publisher=True), StandIn(self.folder), room * UNIT)

    def ship(self, value: int = 0, tokens: int = TOKENS) -> Ticket:
        """Publish a KV that is full of ``value``."""
        publication = self.publisher.reserve(GEOMETRY.kv_bytes(tokens, 2))
        kv_tensor(publication.buffer, (2, 2, 2, tokens, 4), torch.bfloat16).fill_(value)
        return parse(publication.ship(
            lambda buffer, transport, location: describe(BASE, TASK, tokens, buffer, transport, location, "bfloat16"))[0])

    def path(self, ticket: Ticket) -> Path:
        """Its file."""
        return self.shm / ticket.location

    def read(self, ticket: Ticket, reader: CudaIpc | None = None) -> torch.Tensor:
        """The KV as a decode worker takes it."""
        with (reader or self.reader).pull(ticket, []) as buffer:
            return verified_kv(ticket, buffer).clone()

    def close(self) -> None:
        """End both."""
        self.reader.close()
        self.publisher.close()


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path)
    yield host
    host.close()


def test_what_was_written_is_read_and_each_publishers_memory_is_opened_once(host):
    tickets = [host.ship(value) for value in range(3)]
    assert {(t.transport, t.dtype, t.checksum[:6]) for t in tickets} == {("cuda_ipc", "bfloat16", "sum64:")}
    for value, ticket in [*enumerate(tickets), *enumerate(tickets)]:
        got = host.read(ticket)
        assert got.dtype is torch.bfloat16 and got.shape == (2, 2, 2, TOKENS, 4) and torch.equal(got, torch.full_like(got, value))
    assert len(host.driver.opened) == 1
    assert torch.equal(host.read(tickets[1], host.publisher), torch.ones(2, 2, 2, TOKENS, 4, dtype=torch.bfloat16)), "a process may read its own"


def test_the_empty_kv_of_a_one_token_prompt_travels(host):
    assert host.read(host.ship(tokens=0)).shape == (2, 2, 2, 0, 4)


def test_who_has_no_gpu_renews_and_releases(host):
    ticket, router = host.ship(), CudaIpc(Shm(host.shm))
    age(host.path(ticket), 50)
    router.renew(ticket)
    assert time.time() - host.path(ticket).stat().st_mtime < 30
    with pytest.raises(TicketError, match=r"^ticket\.transport: cuda_ipc needs a GPU"):
        host.read(ticket, router)
    for _ in range(2):
        router.release(ticket)
    with pytest.raises(TicketError, match=r"^ticket\.location: .* is gone"):
        host.read(ticket)


def test_released_and_expired_room_is_used_again_and_no_other(host):
    tickets = [host.ship(value) for value in range(4)]
    with pytest.raises(OSError) as error:
        host.ship(9)
    assert error.value.errno == errno.ENOSPC
    host.reader.release(tickets[0])
    age(host.path(tickets[1]), 100)
    host.publisher.leases.expire()
    new = [host.ship(value) for value in (7, 8)]
    for value, ticket in zip((2, 3, 7, 8), [*tickets[2:], *new], strict=True):
        assert (host.read(ticket) == value).all()
    for ticket in tickets[:2]:
        with pytest.raises(TicketError, match="is gone"):
            host.read(ticket)


def test_room_that_is_being_read_is_not_used_again_before_its_reader_ends(host):
    tickets = [host.ship(value) for value in range(4)]
    with host.reader.pull(tickets[2], []) as buffer:
        for ticket in tickets[2:]:
            host.reader.release(ticket)
        host.ship(8)
        with pytest.raises(OSError, match="free"):
            host.ship(9)
        assert (verified_kv(tickets[2], buffer) == 2).all()
    host.ship(9)


@pytest.mark.parametrize("again", [False, True], ids=["released", "and used again"])
def test_room_that_is_released_just_before_it_is_read_is_not_read(host, monkeypatch, again):
    tickets, find = [host.ship(value) for value in range(4)], host.reader.leases.open

    def late(ticket: Ticket) -> int:
        file = find(ticket)
        host.reader.release(ticket)
        if again:
            host.ship(9)
        return file

    monkeypatch.setattr(host.reader.leases, "open", late)
    with pytest.raises(TicketError, match=r"^ticket\.location: .* is gone"), host.reader.pull(tickets[1], []):
        pass


def test_kv_that_never_fits_is_refused_by_the_parameters_name(host):
    with pytest.raises(ValueError, match="^input_ids: .*handoff_tokens"):
        host.publisher.reserve(4 * UNIT + 1)


def test_a_dropped_publication_leaves_neither_room_taken_nor_a_file(host):
    for _ in range(6):
        host.publisher.reserve(NBYTES).drop()
    assert published(host.shm) == []
    with pytest.raises(RuntimeError, match="publisher"):
        host.reader.reserve(1)


moves = st.lists(st.tuples(st.sampled_from(["ship", "ship", "release", "expire", "read", "begin", "end"]), st.integers(0, 9)), max_size=40)


@given(moves)
def test_whatever_happens_a_ticket_reads_its_own_kv_or_is_gone(moves):
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        host = Host(Path(folder))
        stack.callback(host.close)
        tickets: list[Ticket] = []
        live: set[int] = set()
        reading: dict[int, tuple[ExitStack, DeviceBuffer]] = {}
        for move, number in moves:
            at = number % len(tickets) if tickets else None
            if move == "ship":
                try:
                    tickets.append(host.ship(len(tickets)))
                    live.add(len(tickets) - 1)
                except OSError:
                    assert len(live | reading.keys()) == 4, "there was room"
            elif at is None:
                continue
            elif move == "release":
                host.reader.release(tickets[at])
                live.discard(at)
            elif move == "expire" and at in live:
                age(host.path(tickets[at]), 100)
                host.publisher.leases.expire()
                live.discard(at)
            elif move == "read":
                try:
                    assert (host.read(tickets[at]) == at).all()
                    assert at in live
                except TicketError:
                    assert at not in live
            elif move == "begin" and at in live and at not in reading:
                held = ExitStack()
                reading[at] = held, held.enter_context(host.reader.pull(tickets[at], []))
            elif move == "end" and at in reading:
                held, buffer = reading.pop(at)
                assert (verified_kv(tickets[at], buffer) == at).all()
                held.close()
        for held, _ in reading.values():
            held.close()


PUBLISHER = """
import sys
from pathlib import Path
from tests.unit.test_cuda_ipc import Host
host = Host(Path(sys.argv[1]))
sys.stdout.write(host.ship(5).location + "\\n")
sys.stdout.flush()
sys.stdin.read()
"""


def test_a_killed_publishers_kv_is_refused_before_and_while_it_is_read(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", PUBLISHER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               cwd=Path(__file__).parents[2])
    try:
        location = process.stdout.readline().strip()
        host = Host(tmp_path)
        ticket = msgspec.structs.replace(host.ship(5), location=location)
        assert (host.read(ticket) == 5).all(), "it still lives"
        with pytest.raises(TicketError, match=r"^ticket\.location: the publisher of .* has died"), host.reader.pull(ticket, []):
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        with pytest.raises(TicketError, match=r"^ticket\.location: .*(has died|is gone)"):
            host.read(ticket)
        # Nothing of it stays open once another publisher's is.
        other, host.publisher = host.publisher, host.publishing()
        assert (host.read(host.ship(6)) == 6).all() and location.partition("/")[0] not in host.reader._opened
        other.close()
        host.close()
    finally:
        process.kill()
        process.communicate()


def test_kv_of_another_gpu_or_of_memory_that_does_not_open_is_refused_naming_the_location(host):
    ticket = host.ship()
    with pytest.raises(TicketError, match=r"^ticket\.location: the KV of .* lies on GPU stand-in, this worker runs on other"):
        host.read(ticket, CudaIpc(Shm(host.shm), StandIn(host.folder, "other")))
    lease = msgspec.json.decode(host.path(ticket).read_bytes(), type=Lease)
    host.path(ticket).write_bytes(msgspec.json.encode(msgspec.structs.replace(lease, handle=b"nowhere")))
    with pytest.raises(TicketError, match=r"^ticket\.location: .* does not open here: open: "):
        host.read(ticket)


@given(st.binary(max_size=60))
def test_a_file_that_says_something_else_is_refused_naming_the_location(told):
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        host = Host(Path(folder))
        stack.callback(host.close)
        ticket = host.ship()
        host.path(ticket).write_bytes(told)
        with pytest.raises(TicketError, match=r"^ticket\.location: .* does not say where"):
            host.read(ticket)


@given(st.integers(0, NBYTES - 1), st.integers(1, 255), st.randoms(use_true_random=False))
def test_a_changed_byte_is_a_checksum_error(at, change, random):
    with tempfile.TemporaryDirectory() as folder:
        driver = StandIn(Path(folder))
        buffer = DeviceBuffer(driver, driver.allocate(NBYTES), NBYTES)
        buffer.tensor().copy_(torch.frombuffer(bytearray(random.randbytes(NBYTES)), dtype=torch.uint8))
        ticket = describe(BASE, TASK, TOKENS, buffer, "cuda_ipc", dtype="bfloat16")
        verified_kv(ticket, buffer)
        buffer.tensor()[at] ^= change
        with pytest.raises(TicketError, match=r"^ticket\.checksum: "):
            verified_kv(ticket, buffer)


def test_words_that_changed_places_and_blocks_of_a_checksum_count(monkeypatch, tmp_path):
    driver = StandIn(tmp_path)
    buffer = DeviceBuffer(driver, driver.allocate(80), 80)
    words = buffer.tensor().view(torch.int64)
    words.copy_(torch.tensor([1, -1, 2**62, 7, 0, 5, -(2**63), 3, 9, 11]))
    whole = buffer.checksum()
    assert whole == f"sum64:{sum(int(w) * (2 * i + 1) for i, w in enumerate(words)) % 2**64:x}"
    monkeypatch.setattr("sun.handoff.device.WORDS", 3)
    assert buffer.checksum() == whole
    words[[0, 3]] = words[[3, 0]]
    assert buffer.checksum() != whole


def test_a_sequence_is_decoded_from_it_without_a_copy_of_what_the_pass_wrote(host, bench, base_dir, repository):
    it = bench(transport=host.reader)
    task, module = load(base_dir, repository / "prefill_plain" / "1", "cuda", "fp32", "cpu")
    host.publisher.close()
    host.publisher = host.publishing(200)
    within(it.prefill.close)
    it.prefill = PrefillEngine(module, task, host.publisher)
    plain = bench()
    for each in (it, plain):
        each.admit("a", [5] * 20, max_tokens=4)
    assert it.answers() == plain.answers()
    memory = host.publisher._memory
    assert bool(host.publisher.driver.tensor(memory, 512).any())
    with pytest.raises(ValueError, match="handoff_tokens"):
        it.prefill.submit([1] * 400).result(PATIENCE_S)


def test_a_transport_that_does_not_work_here_is_refused_by_name():
    assert TRANSPORTS == ("shm", "inline", "cuda_ipc") and why_not("shm") is None is why_not("inline")
    with pytest.raises(ValueError, match="transport: got 'rdma', expected one of shm, inline, cuda_ipc"):
        publisher("rdma")
    with pytest.raises(ValueError, match="transport: cuda_ipc is for KV that lies on a GPU"):
        publisher("cuda_ipc", room=1 << 20)
    with pytest.raises(ValueError, match="handoff_tokens: must be 1 or more"):
        publisher("cuda_ipc", device="cuda:0")


@pytest.mark.skipif(DEVICE != "cpu", reason="there is a GPU")
def test_without_a_gpu_it_is_said_why():
    assert "CUDA" in why_not("cuda_ipc")
    with pytest.raises(RuntimeError, match="transport: cuda_ipc does not work here: torch"):
        publisher("cuda_ipc", device="cuda:0", room=1 << 20)


def test_sun_doctor_tells_which_prefill_executors_and_transports_work_here_and_why_not():
    seen = {finding.check: finding.seen for finding in Doctor(None).prefill()}
    assert seen["prefill executor torch"] == seen["transport shm"] == "runs here"
    for check in ("prefill executor cuda", "transport cuda_ipc"):
        assert seen[check] == "runs here" or ("not here: " in seen[check] and len(seen[check]) > 20)


class Library:
    """libcuda.so.1 as `CudaDriver` calls it; notes calls, and refuses what it is told to."""

    def __init__(self):
        self.calls: list[str] = []
        self.refused: str | None = None
        self.handle = bytes(range(64))
        for name in cuda_driver._SIGNATURES:
            setattr(self, name, self._function(name))

    def _function(self, name: str):
        def call(*arguments):
            self.calls.append(name)
            if name == "cuGetErrorName":
                arguments[1]._obj.value = b"CUDA_ERROR_INVALID_CONTEXT"
            elif name == self.refused:
                return 201
            elif name == "cuDeviceGetUuid_v2":
                arguments[0]._obj[:] = range(16)
            elif name == "cuMemAlloc_v2":
                arguments[0]._obj.value = 0x7F00_0000_0000
                self.size = arguments[1]
            elif name == "cuIpcGetMemHandle":
                ctypes.memmove(arguments[0], self.handle, 64)
            elif name == "cuIpcOpenMemHandle_v2":
                assert bytes(arguments[1]) == self.handle and arguments[2] == 1
                arguments[0]._obj.value = 0x7E00_0000_0000
            return 0

        return call


def test_the_drivers_calls_are_made_in_its_context_and_what_it_refuses_is_named(monkeypatch):
    library = Library()
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", lambda name: library)
    driver = CudaDriver(0)
    assert driver.uuid == bytes(range(16)).hex()
    address = driver.allocate(100)
    assert address == 0x7F00_0000_0000 and library.size == cuda_driver.PAGE
    handle = driver.export(address)
    assert handle == library.handle and driver.open(handle) == 0x7E00_0000_0000
    driver.close(0x7E00_0000_0000)
    driver.wait()
    made = library.calls[4:]
    assert made[0::3] == ["cuCtxPushCurrent_v2"] * 5 and made[2::3] == ["cuCtxPopCurrent_v2"] * 5
    assert made[1::3] == ["cuMemAlloc_v2", "cuIpcGetMemHandle", "cuIpcOpenMemHandle_v2", "cuIpcCloseMemHandle", "cuCtxSynchronize"]
    library.refused = "cuIpcOpenMemHandle_v2"
    with pytest.raises(DriverError, match="cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_CONTEXT"):
        driver.open(handle)
    assert library.calls[-1] == "cuCtxPopCurrent_v2"
    with pytest.raises(DriverError, match="64 bytes, got 3"):
        driver.open(b"abc")


def test_without_a_driver_it_is_said_which_library_is_missing(monkeypatch):
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libnowhere.so.1")
    assert "libnowhere.so.1" in cuda_driver.missing()
    with pytest.raises(DriverError, match=r"libnowhere\.so\.1"):
        CudaDriver(0)
