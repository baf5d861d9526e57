"""A request in flight: what it has sent, what it waits for, and its one end."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from sun.handoff.ticket import Ticket
from sun.messages import Admit, TokenEvent
from sun.router.errors import RequestError
from sun.router.keys import Grant
from sun.router.record import Record
from sun.router.request import GenerateRequest
from sun.text.stream import TextStream


@dataclass
class Piece:
    """A part of an answer; the last one has a finish reason ("stop" or "length"). Tokens are those since the piece before."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict] = field(default_factory=list)
    num_input_tokens: int = 0
    finish_reason: str | None = None

    def add(self, other: Piece) -> None:
        """Join a later piece to this one."""
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.finish_reason = other.finish_reason


class Client(Protocol):
    """Where an answer goes. Called from any thread, one call at a time."""

    def send(self, piece: Piece) -> None:
        """Deliver a piece; nothing follows one with a finish reason."""

    def fail(self, error: RequestError) -> None:
        """End the answer with an error."""

    def cancelled(self) -> bool:
        """Whether the client has gone or wants no more."""


class Active:
    """One request's way through the router. Whatever ends it first wins; all else is then ignored."""

    def __init__(self, request: GenerateRequest, client: Client, deadline_s: float, record: Record):
        self.key, self.request, self.client, self.record = record.id, request, client, record
        self.grant: Grant | None = None
        self.deadline = time.monotonic() + deadline_s
        self.deadline_s = deadline_s
        self.ended = False
        self.worker: str | None = None
        self.admitted = False
        self.assigned = self.lost = 0
        self.waits_until: float | None = None
        """When it ends, if no worker can have it before."""
        self.ticket: Ticket | None = None
        self.shipment: list[bytes] = []
        self.admit: Admit | None = None
        self.admission: str | None = None
        self.tokens: list[int] = []
        self.module = ""
        self.text: TextStream | None = None
        self._lock = threading.Lock()
        self._pending = Piece()

    def begin(self, text: TextStream, num_input_tokens: int) -> None:
        """The prompt is known; tokens may come."""
        self.text = text
        self._pending = Piece(text=self.request.echo, num_input_tokens=num_input_tokens)

    def assign(self, worker: str, module: str = "") -> Admit | None:
        """Give the sequence to a worker: what it must be told. None if the request has ended.

        module: what the worker is taken to decode with until `accept`: its first tokens may come before its word that it has the sequence.
        Each time under another id, so that a worker that had it before, and may not be dead, is no longer believed.
        """
        with self._lock:
            if self.ended or self.admit is None:
                return None
            self.assigned += 1
            if not self.tokens:
                self.module = module
            self.worker, self.admission, self.admitted = worker, f"{self.key}-{self.assigned}", False
            return msgspec.structs.replace(self.admit, id=self.admission, generated=list(self.tokens), module=self.bound)

    def accept(self, admission: str, module: str) -> bool:
        """The worker has the sequence under this id, and decodes with ``module``. False if it must drop it: the request has ended, or moved on."""
        with self._lock:
            if self.ended or self.admission != admission:
                return False
            self.admitted, self.module, self.waits_until = True, module, None
            self.record.place(self.worker)
            return True

    @property
    def bound(self) -> str:
        """The decode module that must go on with it, "" if any may: it has no token yet, and its prompt's KV is every module's."""
        return self.module if self.tokens else ""

    def withdraw(self, worker: str) -> str | None:
        """Take the sequence back from a worker that has lost it: the id it had there. None if it was not there, or has ended."""
        with self._lock:
            if self.ended or self.worker != worker:
                return None
            admission = self.admission
            self.worker, self.admission, self.admitted = None, None, False
            return admission

    def take(self, event: TokenEvent) -> bool:
        """Handle a worker's event; True if it ended the request, so that the router can clean up after it."""
        if event.error is not None:
            return event.id == self.admission and self.fail(RequestError("INTERNAL", event.error))
        assert self.text is not None and event.token is not None
        with self._lock:
            if self.ended or event.id != self.admission:
                return False
            self.tokens.append(event.token)
            self.record.token()
            text, hit = ("", False) if event.finish == "stop" else self.text.push(event.token)
            finish = "stop" if hit else event.finish
            if event.finish and not hit:
                rest, hit = self.text.finish()
                text, finish = text + rest, "stop" if hit else finish
            self._pending.add(Piece(text, [event.token], self._logprob(event), finish_reason=finish))
            if finish or (self.request.stream and (text or self._wants_tokens)):
                self.ended = finish is not None
                if finish:
                    self.record.finish(finish)
                piece, self._pending = self._pending, Piece(num_input_tokens=self._pending.num_input_tokens)
                self.client.send(piece)
            return self.ended

    def fail(self, error: RequestError) -> bool:
        """End with an error; False if it had ended already."""
        with self._lock:
            if self.ended:
                return False
            self.ended = True
            self.record.fail(error)
            self.client.fail(error)
            return True

    @property
    def task(self) -> str | None:
        """The task that it asks for, by name or by its ticket; None if it names none."""
        return self.request.task or (self.ticket.task if self.ticket else None)

    @property
    def priority(self) -> str:
        """Its priority class: what its key or it itself says."""
        return self.grant.priority if self.grant is not None else self.request.priority or "normal"

    @property
    def cost(self) -> int:
        """Tokens that it may come to, prompt and answer."""
        return len(self.admit.prompt) + self.admit.params.max_tokens

    @property
    def _wants_tokens(self) -> bool:
        return not self.request.returns.isdisjoint(("token_ids", "logprobs", "num_output_tokens"))

    def _logprob(self, event: TokenEvent) -> list[dict]:
        if event.logprob is None:
            return []
        return [{**self._entry(event.token, event.logprob), "top": [self._entry(token, value) for token, value in event.top or []]}]

    def _entry(self, token: int, logprob: float) -> dict:
        return {"token_id": token, "token": self.text.one(token), "logprob": logprob}
