"""What tests drive the library with: a client that keeps its answer, an executor that waits to be let on, and waits that end."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sun.decode.engine import DecodeEngine
from sun.decode.executor import Executor, TorchExecutor
from sun.decode.kv_pool import KVPool
from sun.decode.params import SamplingParams
from sun.handoff.inline import Inline
from sun.handoff.shm import Shm, published
from sun.handoff.transport import Transport
from sun.local import LocalFleet
from sun.messages import Ack, Admit, TokenEvent
from sun.model.loading import load_decode, load_prefill
from sun.prefill.engine import PrefillEngine
from sun.router.active import Piece
from sun.router.errors import RequestError
from sun.router.request import GenerateRequest
from sun.router.router import Router
from sun.slots import Slots

PATIENCE_S = 60.0
"""How long a test waits for what must happen; far more than it ever takes, so that only a hang fails."""

TEXT = "tell me"
OPEN_ENDED = {"ignore_eos": True, "max_tokens": 400}


def files(shm: Shm) -> int:
    """Published KV that nobody has released."""
    return len(published(shm.root))


@contextmanager
def disk(folder: Path, size: str) -> Iterator[bool]:
    """A disk of this size at an empty folder; False, and no disk, if this user may not mount one."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def within(call: Callable[[], Any]) -> Any:
    """The result of ``call`` in a thread; fails the test if it hangs."""
    box: dict[str, Any] = {}

    def run() -> None:
        try:
            box["value"] = call()
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "hangs"
    if "error" in box:
        raise box["error"]
    return box["value"]


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until ``holds``, for states that nothing announces."""
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, "never came to hold"
        threading.Event().wait(0.002)


class Gate:
    """An executor that takes each step only when it is let on; closed at first."""

    def __init__(self, inner: Executor):
        self.inner = inner
        self._changed = threading.Condition()
        self._permits = 0
        self._free = False
        self.entered = 0

    def allow(self, steps: int = 1) -> None:
        """Let ``steps`` more steps happen."""
        with self._changed:
            self._permits += steps
            self._changed.notify_all()

    def open(self) -> None:
        """Let all steps happen from now on."""
        with self._changed:
            self._free = True
            self._changed.notify_all()

    def step(self, tokens, positions, slots):
        """See `Executor.step`."""
        with self._changed:
            self.entered += 1
            self._changed.notify_all()
            # Longer than any test waits: a step that gave up by itself would look like the end that a test waits for.
            assert self._changed.wait_for(lambda: self._free or self._permits, 2 * PATIENCE_S), "nobody let the step on"
            self._permits -= not self._free
        return self.inner.step(tokens, positions, slots)

    def logits(self, hidden):
        """See `Executor.logits`; it is let on always."""
        return self.inner.logits(hidden)

    def wait_entered(self, count: int) -> None:
        """Wait until ``count`` steps have begun (the last of them may be held)."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.entered >= count, PATIENCE_S)


class Bench:
    """A prefill module and a decode worker, side by side, without a router."""

    def __init__(self, base_dir: Path, task_dir: Path, kv_tokens: int = 2048, max_batch: int = 32, transport: Transport | None = None,
                 gated: bool = False):
        self.transport = transport or Inline()
        task, module = load_prefill(base_dir, task_dir)
        self.prefill = PrefillEngine(module, task, self.transport)
        base, model = load_decode(base_dir)
        self.pool = KVPool(base.geometry, kv_tokens)
        self.gate = Gate(TorchExecutor(model, self.pool))
        if not gated:
            self.gate.open()
        self.engine = DecodeEngine(base, self.gate, self.pool, [self.transport], max_batch)
        self.scheduler = self.engine.scheduler

    def shipment(self, prompt: list[int]) -> list[bytes]:
        """What the task's prefill module makes of a prompt."""
        return self.prefill.submit(self.prefill.task.prefilled(prompt)).result(PATIENCE_S)

    def admit(self, id: str, prompt: list[int], shipment: list[bytes] | None = None, router: str = "r", task: str = "plain",
              generated: list[int] = [], **params) -> Ack:
        """Admit a prompt, greedy and of fixed length unless told otherwise."""
        values = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **params}
        admit = Admit(id=id, router=router, task=task, prompt=prompt, params=SamplingParams(**values), generated=generated)
        return self.engine.admit(admit, self.shipment(prompt) if shipment is None else shipment)

    def events(self, router: str = "r") -> list[TokenEvent]:
        """All events of a router until it has no sequence left."""
        return within(lambda: [e for steps in self.engine.outbox.listen(router) for step in steps for e in step.events])

    def answers(self, router: str = "r") -> dict[str, list[int]]:
        """Each sequence's tokens, none of which may have ended with an error."""
        tokens: dict[str, list[int]] = {}
        for event in self.events(router):
            assert event.error is None, event.error
            tokens.setdefault(event.id, []).append(event.token)
        return tokens

    def settle(self, holds: Callable[[], bool]) -> None:
        """Wait until the engine's state ``holds``."""
        with self.engine._changed:
            assert self.engine._changed.wait_for(holds, PATIENCE_S), "never came to hold"

    def close(self) -> None:
        """Stop both engines."""
        self.gate.open()
        within(self.prefill.close)
        within(self.engine.close)


class Answer:
    """A router's client that keeps what it is sent."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.errors: list[RequestError] = []
        self.done, self.begun, self.gone = threading.Event(), threading.Event(), False

    def send(self, piece: Piece) -> None:
        """Keep a piece."""
        assert not self.done.is_set(), "a piece after the end"
        self.pieces.append(piece)
        self.begun.set()
        if piece.finish_reason:
            self.done.set()

    def fail(self, error: RequestError) -> None:
        """Keep an error."""
        self.errors.append(error)
        self.done.set()

    def cancelled(self) -> bool:
        """Whether the test has hung up."""
        return self.gone

    def wait(self) -> Answer:
        """Wait for the end."""
        assert self.done.wait(PATIENCE_S), "never ended"
        return self

    @property
    def ends(self) -> int:
        """How often it ended: once, if all is well."""
        return len(self.errors) + sum(piece.finish_reason is not None for piece in self.pieces)

    @property
    def whole(self) -> Piece:
        """All pieces as one; raises the request's error."""
        self.wait()
        for error in self.errors:
            raise error
        whole = Piece(num_input_tokens=self.pieces[0].num_input_tokens)
        for piece in self.pieces:
            whole.add(piece)
        return whole

    @property
    def error(self) -> RequestError:
        """The error it must have ended with."""
        self.wait()
        assert len(self.errors) == 1, "ended without an error"
        return self.errors[0]


class Service:
    """A router over a fleet in this process."""

    def __init__(self, fleet: LocalFleet, router: Router):
        self.fleet, self.router = fleet, router
        self.gates: dict[str, Gate] = {}

    def gate(self, worker: str = "decode_0") -> Gate:
        """Hold a worker's steps from now on."""
        engine = self.fleet.decodes[worker]
        engine.executor = self.gates[worker] = Gate(engine.executor)
        return self.gates[worker]

    def ask(self, text: str = "hello", task: str | None = "plain", answer: Answer | None = None, stream: bool = False,
            returns: tuple[str, ...] = ("token_ids",), deadline_s: float | None = None, more: dict[str, Any] = {}, **sampling) -> Answer:
        """Submit a request, greedy unless told otherwise; ``more``: other fields of the request."""
        answer = answer or Answer()
        self.router.submit(GenerateRequest(
            messages=[{"role": "user", "content": text}], sampling={"temperature": 0, "max_tokens": 8, **sampling}, task=task,
            stream=stream, returns=frozenset(returns), deadline_s=deadline_s, **more), answer)
        return answer

    def shrink(self, worker: str, tokens: int) -> None:
        """Make a worker's KV pool smaller than the others', and wait until the router knows."""
        pool = self.fleet.decodes[worker].pool
        pool.budget, pool._slots = tokens, Slots(tokens)
        eventually(lambda: self.router.pool.budget == sum(engine.pool.budget for engine in self.fleet.decodes.values()))

    def idle(self) -> None:
        """Wait until no request, sequence or slot is held, and check every worker's books."""
        eventually(lambda: self.router.inflight == 0)
        for engine in self.fleet.decodes.values():
            with engine._changed:
                assert engine._changed.wait_for(lambda e=engine: not e.scheduler.sequences, PATIENCE_S), "a sequence was left behind"
                engine.scheduler.check_integrity()
                assert engine.pool.free_tokens == engine.pool.budget

    def close(self) -> None:
        """Stop router and fleet."""
        for gate in self.gates.values():
            gate.open()
        within(self.router.close)
        within(self.fleet.close)
