"""The router: from a request to its answer, over any task's prefill module and any decode worker."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import msgspec

from sun.handoff.ticket import Ticket
from sun.handoff.ticket import parse as parse_ticket
from sun.handoff.transport import Transport
from sun.messages import Admit, TokenEvent
from sun.model.manifest import TaskManifest
from sun.router.active import Active, Client
from sun.router.admission import Admission
from sun.router.errors import Absent, Busy, Gone, RequestError
from sun.router.fleet import Fleet
from sun.router.gaps import Gaps
from sun.router.gauges import set_gauges, set_prefills
from sun.router.keys import Keys
from sun.router.limits import Limits
from sun.router.listeners import Listeners
from sun.router.meter import Meter, NoMeter
from sun.router.pace import Pace
from sun.router.placement import STRANDED_S, Placement, no_worker
from sun.router.policy import Policy
from sun.router.pool import Pool
from sun.router.record import Record
from sun.router.request import GenerateRequest, Handover, invalid
from sun.router.tasks import TaskRegistry
from sun.text.prompt import PromptFormat
from sun.text.stream import TextStream

log = logging.getLogger("sun.router")
POLL_S = 0.2
READERS, MOVERS = 4, 4
"""Threads that read requests, and that find new workers for sequences beside those that begin."""
GAUGE_POLLS = 5
"""Gauges are set, times between tokens told, and lost prefill modules looked for, at every so many polls: once a second."""
MOST_PREFILLS = 2
"""A prompt that so many prefill processes did not survive is not given to another: it may be what kills them."""
MOST_KINDS = 4
"""How often a prompt is prefilled because a task's new files and its loaded module are not of one kind; each change in between takes one more."""
CLOSE_S = 5.0


class Router:
    """Admits, tokenises, has the prompt prefilled, picks a worker, and turns the workers' events into answers.

    submit() returns at once. Every request ends exactly once: with its last piece, or with an error. keys: who may ask, None for
    everybody. told(record) is called at each request's end, from any thread, and must return at once.
    """

    def __init__(self, fleet: Fleet, workers: list[str], tasks: TaskRegistry, prompts: PromptFormat, policy: Policy,
                 transports: list[Transport], limits: Limits = Limits(), meter: Meter = NoMeter(), keys: Keys | None = None,
                 told: Callable[[Record], None] = lambda record: None):
        self.fleet, self.tasks, self.prompts, self.limits, self.meter = fleet, tasks, prompts, limits, meter
        self.keys, self.pace, self.gaps, self._told = keys, Pace(), Gaps(meter), told
        self.name = secrets.token_hex(8)
        self.transports = {transport.name: transport for transport in transports}
        self._prefills: set[str] = set()
        self._active: dict[str, Active] = {}
        self._lock = threading.Lock()
        self._closed, self._leaving = threading.Event(), False
        self.pool = Pool(fleet, workers, policy, self._lost, self._found)
        self.placement = Placement(fleet, self.pool, meter, lambda worker: self.listeners.listen(worker), self._again, self._fail)
        self.listeners = Listeners(fleet, self.name, self.pool, self.placement, self.pace, self._active, self._take, self._closed)
        self.admission = Admission(limits.queue, limits.starting, lambda: limits.max_running_tokens or self.pool.budget, self.pace.seconds)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._starters = ThreadPoolExecutor(limits.starting + MOVERS, thread_name_prefix="start")
        self._poller = threading.Thread(target=self._poll, name="poll", daemon=True)
        self._poller.start()
        self.pool.start()

    @property
    def inflight(self) -> int:
        """Requests that have not ended."""
        return len(self._active)

    def submit(self, request: GenerateRequest, client: Client) -> None:
        """Take a request; its answer or error goes to ``client``, UNAVAILABLE at once if too many are in flight."""
        active = self._known(request, client)
        try:
            self._enter(active)
        except RequestError as error:
            self._fail(active, error)
        else:
            self._readers.submit(self._run, self._read, active)

    def refuse(self, error: RequestError, client: Client, id: str = "", handover: Handover | None = None) -> None:
        """End a request that could not even be read, as any other that is refused. id: what the client calls it; handover: what it came with."""
        self._fail(self._known(GenerateRequest([], {}, id=id, handover=handover), client), error)

    def _known(self, request: GenerateRequest, client: Client) -> Active:
        record = Record(secrets.token_hex(8), self.meter, lambda record: self._ended(active), self.gaps.note)
        record.request_id, record.trace, record.messages = request.id, request.trace, request.messages
        record.asked, record.handed_over = (request.task or "")[:64], request.handover is not None
        active = Active(request, client, min(request.deadline_s or self.limits.deadline_s, self.limits.deadline_s), record)
        if request.handover is not None and self.keys is None:
            # At once, so that its KV is released however the request ends.
            with suppress(ValueError):  # `_read` says what is wrong with it
                active.ticket = parse_ticket(request.handover.shipment[0])
        return active

    def _enter(self, active: Active) -> None:
        """Let a request in. Raises RequestError if it may not come, or there is no room."""
        request = active.request
        if self.keys is not None:
            holder = self.keys.holder(request.api_key)
            active.record.key = holder.name
            active.grant = holder.enter(request.task, request.priority, self._one_ends_s)
            if request.handover is not None:
                raise RequestError("PERMISSION_DENIED", "ticket: is not taken where keys are needed")
        with self._lock:
            if self._closed.is_set():
                raise RequestError("UNAVAILABLE", "the router is shutting down")
            if self._leaving:
                raise RequestError("UNAVAILABLE", "the server is stopping; requests that it has begun end, and it takes no more")
            if full := self._full(active.task):
                raise Busy(f"max_inflight: {full}", self._one_ends_s())
            self._active[active.key] = active

    def _one_ends_s(self) -> float:
        """Seconds until one of the requests in flight has probably ended: what one may need on average, at the recent pace."""
        return self.pace.seconds(self.admission.tokens / max(1, self.inflight))

    def _ended(self, active: Active) -> None:
        """A request's end, once for each: its key's books are closed, and all else is told."""
        if active.grant is not None:
            active.grant.end(active.record.prompt + active.record.tokens)
        self._told(active.record)

    def _full(self, task: str | None) -> str:
        """Why a further request of the task is too many, "" if it is not."""
        most = self.limits.max_inflight
        if len(self._active) >= most:
            return f"{most} requests are in flight, which is the limit"
        most = max(1, most * 3 // 4)
        if sum(active.task == task for active in list(self._active.values())) >= most and len(self.tasks.names()) > 1:
            return f"{most} requests of task {task!r} are in flight, which is the limit for one task"
        return ""

    def leave(self) -> int:
        """Take no more requests from now on; how many there still are, queued ones too: they all end as ever, unless `close` comes first."""
        with self._lock:
            self._leaving = True
            return self.inflight

    def close(self) -> None:
        """End what is in flight with an error and stop."""
        self._closed.set()
        self.pool.close()
        self._poller.join()
        for active in list(self._active.values()):
            self._fail(active, RequestError("UNAVAILABLE", "the router is shutting down"))
        self._readers.shutdown()
        self._starters.shutdown()
        self.listeners.join(CLOSE_S)

    def _run(self, step: Callable[[Active], None], active: Active) -> None:
        """A request's step in a starter thread; what goes wrong is the request's end, and the router goes on."""
        try:
            step(active)
        except RequestError as error:
            self._fail(active, error)
        except ValueError as error:
            self._fail(active, invalid(error))
        except Exception as error:
            log.exception("request %s failed", active.key)
            self._fail(active, RequestError("INTERNAL", f"{type(error).__name__}: {error}"))

    def _read(self, active: Active) -> None:
        """Check a request, turn its text into tokens, and let it wait; in one of the reader threads."""
        request, handover = active.request, active.request.handover
        if handover is not None:
            active.ticket = active.ticket or parse_ticket(handover.shipment[0])
            if request.task not in (None, active.ticket.task):
                raise ValueError(f"task: is {request.task!r}, but the ticket is of task {active.ticket.task!r}")
        task = self.tasks.get(active.task)
        params = request.params(task.sampling)
        prompt = handover.prompt if handover is not None else self.prompts.encode(request.messages)
        if not prompt:
            raise ValueError("text_input: gives no tokens; at least one is needed")
        if len(prompt) >= self.limits.max_tokens:
            raise ValueError(f"text_input: the prompt has {len(prompt)} tokens, the limit is {self.limits.max_tokens - 1}")
        room = self.limits.max_tokens - len(prompt) + 1
        if "max_tokens" not in request.sampling:  # a default is a wish
            there = max(1, min(room, (self.pool.largest or self.limits.max_tokens) - len(prompt) + 1))
            if params.min_tokens > there:
                raise ValueError(f"sampling_parameters.min_tokens: {params.min_tokens} on top of a prompt of {len(prompt)} tokens is over the limit; "
                                 f"it can be at most {there} here")
            params = msgspec.structs.replace(params, max_tokens=min(params.max_tokens, there))
        if params.max_tokens > room:
            raise ValueError(
                f"sampling_parameters.max_tokens: {params.max_tokens} on top of a prompt of {len(prompt)} tokens is over the limit; "
                f"it can be at most {room} here")
        active.begin(TextStream(self.prompts.tokenizer.backend_tokenizer, params.stop, params.min_tokens), len(prompt))
        active.admit = Admit(id=active.key, router=self.name, task=task.name, prompt=prompt, params=params)
        active.record.queue(task.name, len(prompt))
        if active.grant is not None:
            active.grant.charge(active.cost)
        self.admission.put(active)
        self._dispatch()

    def _dispatch(self) -> None:
        """Begin what may begin now."""
        while not self._closed.is_set() and (active := self.admission.take()) is not None:
            self._starters.submit(self._begin, active)

    def _begin(self, active: Active) -> None:
        try:
            self._run(self._place, active)
        finally:
            self.admission.begun(active)
            self._dispatch()

    def _place(self, active: Active) -> None:
        """From the queue into a worker, in one of the starter threads."""
        if active.ended:
            return
        active.record.begin()
        handover, task = active.request.handover, self.tasks.get(active.admit.task)
        if handover is None:
            try:
                self._prefill(active, task)
            except Gone as error:
                return self._postpone(active, error)
            self.admission.back(task.name)
            active.record.prefill(active.ticket.nbytes)
            self.pace.note(len(active.admit.prompt))
        else:
            active.shipment = handover.shipment
            # Our own prefill says which weights it ran, perhaps older ones than the task's files, while those are being loaded.
            if not task.made(active.ticket.weights_digest):
                raise ValueError(f"ticket.weights_digest: {active.ticket.weights_digest} is not task {task.name!r}'s, {task.weights_digest}; prefill the prompt again")
        if active.ended:
            self._clean(active)
            return
        self.placement.assign(active)

    def _prefill(self, active: Active, task: TaskManifest) -> None:
        """Have its prompt's KV made, again in the other way while the task's files and its loaded prefill module are not of one kind."""
        for _ in range(MOST_KINDS):
            shipment = self.fleet.prefill(task.name, task.prefilled(active.admit.prompt))
            ticket = parse_ticket(shipment[0])
            if bool(ticket.hidden) == task.whole_prompt:
                active.shipment, active.ticket = shipment, ticket
                return
            self._release(active, ticket)
            task = msgspec.structs.replace(task, whole_prompt=not task.whole_prompt)
        raise Gone(f"prefill_{task.name}: changed while it had the prompt, {MOST_KINDS} times")

    def _postpone(self, active: Active, error: Gone) -> None:
        """A request's prefill module is not there, or was lost with its prompt: it waits in the queue until there is one."""
        if not isinstance(error, Absent):
            active.lost += 1
            if active.lost >= MOST_PREFILLS:
                raise Gone(f"{error}; it was the second to have the prompt")
        self.admission.put_back(active)

    def _again(self, active: Active) -> None:
        """Look for another worker for a sequence, in one of the starter threads."""
        if not self._closed.is_set():
            self._starters.submit(self._run, self.placement.assign, active)

    def _lost(self, worker: str) -> None:
        """A worker is dead or hangs: nobody listens to it any more, and others go on with what it had."""
        self.listeners.lose(worker)
        self.placement.lost(worker, list(self._active.values()))

    def _found(self, worker: str) -> None:
        self.placement.found(worker)

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
        self.placement.forget(active)
        if active.admit is not None:
            self.admission.ended(active)
            self._dispatch()
        self._release(active, active.ticket)
        if active.worker is not None and not finished:
            self.placement.abort(active.worker, [active.admission])

    def _release(self, active: Active, ticket: Ticket | None) -> None:
        """Free a prompt's KV, if there is any."""
        if ticket is not None and ticket.transport in self.transports:
            try:
                self.transports[ticket.transport].release(ticket)
            except Exception as error:  # a handed-over ticket may name any location
                log.warning("could not release the ticket of %s: %s", active.key, error)

    def _poll(self) -> None:
        """Nobody tells of a cancel or a deadline: look, and keep the leases of tickets in use."""
        for count in itertools.count():
            if self._closed.wait(POLL_S):
                return
            if count % GAUGE_POLLS == 0:
                set_gauges(self.meter, self.tasks.names(), list(self._active.values()), self.pool)
                self.gaps.tell()
                self._look_for_modules()
            for active in list(self._active.values()):
                try:
                    self._check(active)
                except Exception:
                    log.exception("could not check request %s", active.key)

    def _look_for_modules(self) -> None:
        """Let requests go on whose prefill module is there again, and note which are there."""
        try:
            self.admission.look(self.fleet.present)
            self._dispatch()
            set_prefills(self.meter, self._prefills, self.tasks.names(), self.fleet.present)
        except Exception:
            log.exception("could not look for prefill modules")

    def _check(self, active: Active) -> None:
        if active.client.cancelled():
            self._fail(active, RequestError("CANCELLED", "the client cancelled the request"))
        elif time.monotonic() > active.deadline:
            self._fail(active, RequestError("DEADLINE", f"deadline_s: not finished within {active.deadline_s:g} s"))
        elif self.admission.away_s(active) > STRANDED_S:
            self._fail(active, RequestError("UNAVAILABLE", f"prefill_{active.admit.task} is not there, for {STRANDED_S:g} s now; try again later"))
        elif active.admit is not None and active.worker is None and self.pool.away_s > STRANDED_S:
            self._fail(active, no_worker())
        else:
            self.placement.check(active)
            if not active.ended and active.ticket is not None and active.ticket.transport in self.transports:
                self.transports[active.ticket.transport].renew(active.ticket)
