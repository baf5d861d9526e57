"""A call outlives an update of the model that it calls, and is lost with the process that has it; an error is the model's own unless that died."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from sun.router.errors import Gone, RequestError
from sun.stubs import Holders, Stubs

from .harness import PATIENCE_S, eventually

MODEL = "prefill_bash"


class Response:
    """A called model's response, as Triton gives it: a tensor, or an error."""

    def __init__(self, value: bytes = b"", error: str = ""):
        self.value, self.text = value, error

    def has_error(self):
        return bool(self.text)

    def error(self):
        return SimpleNamespace(message=lambda: self.text, code=lambda: None)

    def output_tensors(self):
        return [SimpleNamespace(as_numpy=lambda: SimpleNamespace(reshape=lambda shape: [self.value]))]


class Triton:
    """What Triton does for a call: nothing until a test has it ``answer``. looks: how often a call has looked after its model's processes."""

    def __init__(self):
        self.looks = 0
        self._answers: queue.SimpleQueue[Response] = queue.SimpleQueue()

    def exec(self) -> Response:
        return self._answers.get()

    def answer(self, value: bytes = b"", error: str = "") -> None:
        self._answers.put(Response(value, error))

    def looked(self) -> None:
        """Wait until the call has looked twice from now on."""
        end = self.looks + 3
        eventually(lambda: self.looks >= end)


@pytest.fixture
def triton(monkeypatch) -> Triton:
    """Triton under `sun_router.calls`, whose calls look often."""
    triton, lost = Triton(), Holders.lost
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", SimpleNamespace(
        InferenceRequest=lambda **asked: triton, TritonError=SimpleNamespace(INVALID_ARG=1, UNAVAILABLE=2, NOT_FOUND=3)))
    monkeypatch.delitem(sys.modules, "sun_router.calls", raising=False)
    monkeypatch.setattr("sun_router.calls.LOOK_S", 0.02)

    def counted(*args, **settings):
        triton.looks += 1
        return lost(*args, **settings)

    monkeypatch.setattr(Holders, "lost", counted)
    return triton


@pytest.fixture
def call(triton) -> Iterator:
    """A function: calls the model, and waits until the call looks after it."""
    from sun_router.calls import Calls

    with ThreadPoolExecutor(1) as pool:
        def call() -> Future[list[bytes]]:
            called = pool.submit(lambda: Calls(Stubs(os.getpid())).call(MODEL, None, "ticket"))
            triton.looked()
            return called

        yield call


def end(process: subprocess.Popen) -> None:
    """End a process as its server does, which waits for it."""
    process.kill()
    process.wait()


@pytest.fixture
def called(triton, call, start_stub) -> Future[list[bytes]]:
    """A call that was made before an update, which has just ended the old process."""
    old = start_stub(MODEL)
    called = call()
    start_stub(MODEL)
    triton.looked()
    end(old)
    return called


def test_a_call_that_the_new_process_serves_is_waited_for_when_the_old_one_ends(triton, called):
    triton.looked()
    assert not called.done()
    triton.answer(b"ticket")
    assert called.result(PATIENCE_S) == [b"ticket"]


def test_the_new_processs_error_is_its_own(triton, called):
    triton.answer(error="input_ids: too many")
    with pytest.raises(RequestError, match="^prefill_bash: input_ids: too many") as error:
        called.result(PATIENCE_S)
    assert not isinstance(error.value, Gone)


@pytest.mark.parametrize("died", ["unanswered", "with an error", "beside a new one", "and was healed"])
def test_a_killed_processs_call_is_lost(triton, call, start_stub, died):
    process = start_stub(MODEL)
    called = call()
    if died == "beside a new one":
        start_stub(MODEL)
        triton.looked()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    if died == "with an error":
        triton.answer(error="the stub is gone")
    if died == "and was healed":
        process.wait()
        start_stub(MODEL)
    with pytest.raises(Gone, match="^prefill_bash: its process died"):
        called.result(PATIENCE_S)


def test_one_of_an_update_that_failed_is_nobodys_loss(triton, call, start_stub):
    start_stub(MODEL)
    new = start_stub(MODEL)
    called = call()
    end(new)
    triton.looked()
    triton.answer(b"ticket")
    assert called.result(PATIENCE_S) == [b"ticket"]
