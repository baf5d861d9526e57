"""The router: from a request to its answer, over any task's prefill module and any decode worker."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sun.handoff.ticket import parse as parse_ticket
from sun.handoff.transport import Transport
from sun.messages import Admit, TokenEvent
from sun.router.active import Active, Client
from sun.router.errors import RequestError
from sun.router.fleet import Fleet
from sun.router.policy import Policy
from sun.router.request import GenerateRequest
from sun.router.tasks import TaskRegistry
from sun.text.prompt import PromptFormat
from sun.text.stream import TextStream

log = logging.getLogger("sun.router")
POLL_S = 0.2


@dataclass(frozen=True)
class Limits:
    """The router's bounds: requests in flight before it refuses, tokens a sequence may have, seconds it may take."""

    max_inflight: int = 256
    max_tokens: int = 4096
    deadline_s: float = 600.0
    starting: int = 16


class Router:
    """Admits, tokenises, has the prompt prefilled, picks a worker, and turns the workers' events into answers.

    submit() returns at once. Every request ends exactly once: with its last piece, or with an error.
    """

    def __init__(self, fleet: Fleet, workers: list[str], tasks: TaskRegistry, prompts: PromptFormat, policy: Policy,
                 transports: list[Transport], limits: Limits = Limits()):
        self.fleet, self.tasks, self.prompts, self.policy, self.limits = fleet, tasks, prompts, policy, limits
        self.name = secrets.token_hex(8)
        self.transports = {transport.name: transport for transport in transports}
        self._loads = dict.fromkeys(workers, 0)
        self._listening: set[str] = set()
        self._active: dict[str, Active] = {}
        self._lock = threading.Lock()
        self._starters = ThreadPoolExecutor(limits.starting, thread_name_prefix="start")
        self._listeners = ThreadPoolExecutor(len(workers), thread_name_prefix="listen")
        self._closed = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="poll", daemon=True)
        self._poller.start()

    @property
    def inflight(self) -> int:
        """Requests that have not ended."""
        return len(self._active)

    def submit(self, request: GenerateRequest, client: Client) -> None:
        """Take a request; its answer or error goes to ``client``, UNAVAILABLE at once if too many are in flight."""
        deadline_s = min(request.deadline_s or self.limits.deadline_s, self.limits.deadline_s)
        active = Active(secrets.token_hex(8), request, client, deadline_s)
        with self._lock:
            full = len(self._active) >= self.limits.max_inflight
            if not full and not self._closed.is_set():
                self._active[active.key] = active
        if full:
            active.fail(RequestError("UNAVAILABLE", f"max_inflight: {self.limits.max_inflight} requests are in flight, which is the limit; try again later"))
        elif self._closed.is_set():
            active.fail(RequestError("UNAVAILABLE", "the router is shutting down"))
        else:
            self._starters.submit(self._start, active)

    def close(self) -> None:
        """End what is in flight with an error and stop."""
        self._closed.set()
        self._poller.join()
        for active in list(self._active.values()):
            self._fail(active, RequestError("UNAVAILABLE", "the router is shutting down"))
        self._starters.shutdown()
        self._listeners.shutdown()

    def _start(self, active: Active) -> None:
        try:
            self._place(active)
        except RequestError as error:
            self._fail(active, error)
        except ValueError as error:
            self._fail(active, RequestError("INVALID_ARG", str(error)))
        except Exception as error:  # the request's end; the router goes on
            log.exception("request %s failed", active.key)
            self._fail(active, RequestError("INTERNAL", f"{type(error).__name__}: {error}"))

    def _place(self, active: Active) -> None:
        """Everything up to the worker's taking it, in one of the starter threads."""
        request, handover = active.request, active.request.handover
        if handover is not None:
            active.ticket = parse_ticket(handover.shipment[0])
            if request.task not in (None, active.ticket.task):
                raise ValueError(f"task: is {request.task!r}, but the ticket is of task {active.ticket.task!r}")
        task = self.tasks.get(active.ticket.task if active.ticket else request.task)
        params = request.params(task.sampling)
        prompt = handover.prompt if handover is not None else self.prompts.encode(request.messages)
        if not prompt:
            raise ValueError("text_input: gives no tokens; at least one is needed")
        if len(prompt) >= self.limits.max_tokens:
            raise ValueError(f"text_input: the prompt has {len(prompt)} tokens, the limit is {self.limits.max_tokens - 1}")
        if len(prompt) + params.max_tokens - 1 > self.limits.max_tokens:
            raise ValueError(
                f"sampling_parameters.max_tokens: {params.max_tokens} on top of a prompt of {len(prompt)} tokens is over the limit; "
                f"it can be at most {self.limits.max_tokens - len(prompt) + 1} here")
        active.begin(TextStream(self.prompts.tokenizer.backend_tokenizer, params.stop), len(prompt))
        if active.ended:
            return
        if handover is None:
            shipment = self.fleet.prefill(task.name, prompt[:-1])
            active.ticket = parse_ticket(shipment[0])
        else:
            shipment = handover.shipment
        if active.ticket.weights_digest != task.weights_digest:
            raise ValueError(f"ticket.weights_digest: {active.ticket.weights_digest} is not task {task.name!r}'s, {task.weights_digest}; prefill the prompt again")
        if active.ended:
            self._clean(active)
            return
        self._admit(active, Admit(id=active.key, router=self.name, task=task.name, prompt=prompt, params=params), shipment)

    def _admit(self, active: Active, admit: Admit, shipment: list[bytes]) -> None:
        with self._lock:
            worker = self.policy.pick(admit.task, self._loads)
            self._loads[worker] += admit.params.max_tokens
        active.worker = worker
        try:
            ack = self.fleet.admit(worker, admit, shipment)
        except Exception:
            with self._lock:
                self._loads[worker] -= admit.params.max_tokens
            raise
        active.admitted = True
        with self._lock:
            self._loads[worker] = ack.load
        if active.ended:  # cancelled while it was being placed: the one who ended it could not know the worker
            self._clean(active)
        else:
            self._listen(worker)

    def _listen(self, worker: str) -> None:
        with self._lock:
            if worker in self._listening:
                return
            self._listening.add(worker)
        self._listeners.submit(self._hear, worker)

    def _hear(self, worker: str) -> None:
        """Follow a worker's events while this router has sequences there."""
        known = [a for a in list(self._active.values()) if a.worker == worker and a.admitted]
        try:
            for step in self.fleet.listen(worker, self.name):
                with self._lock:
                    self._loads[worker] = step.load
                for event in step.events:
                    active = self._active.get(event.id)
                    if active is not None:
                        self._take(active, event)
            for active in [a for a in known if not a.ended]:  # else it would wait for events that never come
                self._fail(active, RequestError("INTERNAL", f"decode worker {worker} no longer has the sequence"))
        except Exception as error:  # whoever decodes there must hear of it
            log.exception("events of %s ended", worker)
            for active in [a for a in list(self._active.values()) if a.worker == worker]:
                self._fail(active, RequestError("INTERNAL", f"decode worker {worker} failed: {error}"))
        with self._lock:
            self._listening.discard(worker)
            more = any(active.worker == worker and active.admitted and not active.ended for active in list(self._active.values()))
        if more and not self._closed.is_set():
            self._listen(worker)

    def _take(self, active: Active, event: TokenEvent) -> None:
        """Handle one request's event; what goes wrong with it ends that request alone."""
        try:
            ended = active.take(event)
        except Exception as error:
            log.exception("request %s failed", active.key)
            self._fail(active, RequestError("INTERNAL", f"{type(error).__name__}: {error}"))
        else:
            if ended:
                self._clean(active, finished=event.finish is not None)

    def _fail(self, active: Active, error: RequestError) -> None:
        try:
            ended = active.fail(error)
        except Exception:  # the client is gone; the request has ended all the same
            log.exception("could not tell the client of request %s: %s", active.key, error)
            ended = True
        if ended or active.key in self._active:
            self._clean(active)

    def _clean(self, active: Active, finished: bool = False) -> None:
        """Forget an ended request; free its ticket, and its slot unless the worker itself ended it."""
        self._active.pop(active.key, None)
        if active.ticket is not None and active.ticket.transport in self.transports:
            try:
                self.transports[active.ticket.transport].release(active.ticket)
            except Exception as error:  # a handed-over ticket may name any location
                log.warning("could not release the ticket of %s: %s", active.key, error)
        if active.worker is not None and not finished:
            try:
                ack = self.fleet.abort(active.worker, [active.key])
                with self._lock:
                    self._loads[active.worker] = ack.load
            except Exception:
                log.exception("could not abort %s on %s", active.key, active.worker)

    def _poll(self) -> None:
        """Nobody tells of a cancel or a deadline: look, and keep the leases of tickets in use."""
        while not self._closed.wait(POLL_S):
            for active in list(self._active.values()):
                try:
                    self._check(active)
                except Exception:
                    log.exception("could not check request %s", active.key)

    def _check(self, active: Active) -> None:
        if active.client.cancelled():
            self._fail(active, RequestError("CANCELLED", "the client cancelled the request"))
        elif time.monotonic() > active.deadline:
            self._fail(active, RequestError("DEADLINE", f"deadline_s: not finished within {active.deadline_s:g} s"))
        elif active.ticket is not None and active.ticket.transport in self.transports:
            self.transports[active.ticket.transport].renew(active.ticket)
