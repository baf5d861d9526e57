"""The decode worker: admits sequences of all tasks, steps them in one batch, samples, and reports per step."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from sun import gpu
from sun.alone import alone
from sun.decode.executor import REPLAY_ROWS, Executor
from sun.decode.kv_pool import KVPool
from sun.decode.outbox import Outbox
from sun.decode.params import SamplingParams
from sun.decode.sampling import Choice, draw, logprobs, penalise
from sun.decode.scheduler import Scheduler
from sun.decode.sequence import Sequence
from sun.handoff.kv import hidden_state, verified_kv
from sun.handoff.ticket import TicketError, check_fits, parse
from sun.handoff.transport import Transport
from sun.messages import Ack, Admit, Load, Stats, StepEvents, StepRecord, TokenEvent
from sun.model.manifest import BaseManifest

STEPS_KEPT = 4096


class DecodeEngine:
    """One worker of the pool. Two threads: one pulls the KV of admitted sequences, one runs the steps.

    max_batch: most sequences in a step. threads: torch's threads for a step (None: torch's default). stepped: told of each step.
    pick: picks tokens from the executor's logits, where they are (None: `choose`, on the CPU).
    module: what the executor decodes with, see `sun.model.loading.module_name`.
    """

    def __init__(self, base: BaseManifest, executor: Executor, pool: KVPool, transports: list[Transport],
                 max_batch: int = 64, threads: int | None = None, stepped: Callable[[StepRecord], None] = lambda record: None,
                 pick: Callable[[Tensor, list[Sequence]], list[Choice]] | None = None, module: str = ""):
        self.base, self.executor, self.pool, self.threads, self.module = base, executor, pool, threads, module
        self.transports = {transport.name: transport for transport in transports}
        self.scheduler, self._stepped, self._pick = Scheduler(pool, max_batch), stepped, pick or choose
        self.outbox = Outbox()
        self._by_id: dict[str, Sequence] = {}
        self._records: deque[StepRecord] = deque(maxlen=STEPS_KEPT)
        self._step = self._begun = 0
        self._changed = threading.Condition()
        self._closed = self._draining = False
        with alone(Path(__file__).parent):
            draw(torch.zeros(1), SamplingParams(temperature=1.0, seed=0), 0)  # compiles it now and not in somebody's request
        self._threads = [threading.Thread(target=t, name=t.__name__, daemon=True) for t in (self._pull_loop, self._step_loop)]
        for thread in self._threads:
            thread.start()

    def admit(self, admit: Admit, shipment: list[bytes]) -> Ack:
        """Take a sequence, unless the worker drains. Raises ValueError (TicketError) naming the field if it must not or could never be decoded."""
        if not admit.prompt:
            raise ValueError("prompt: at least one token id is needed")
        self.base.check_ids("prompt", admit.prompt)
        if not shipment:
            raise TicketError("ticket: missing; the message's second element must be the ticket")
        ticket = parse(shipment[0])
        check_fits(ticket, self.base, admit.task, len(admit.prompt))
        if ticket.transport not in self.transports:
            raise TicketError(f"ticket.transport: got {ticket.transport!r}, this worker has {', '.join(self.transports)}")
        params = admit.params
        if params.temperature > 0 and params.seed is None:
            raise ValueError("seed: is needed to sample (temperature is over 0); the router draws one where the client gave none")
        if len(admit.generated) >= params.max_tokens:
            raise ValueError(f"generated: {len(admit.generated)} tokens, but max_tokens is {params.max_tokens}")
        self.base.check_ids("generated", admit.generated)
        if admit.module not in ("", self.module):
            raise RuntimeError(f"module: {admit.module} began the sequence, this worker has {self.module}")
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self.base.eos_ids))
        sequence = Sequence(admit, ticket, shipment, frozenset(t for t in stops if t < self.base.vocab))
        limit = min(self.pool.budget, self.base.max_context)
        if sequence.need > limit:
            raise ValueError(f"max_tokens: prompt ({len(admit.prompt)}) and max_tokens ({params.max_tokens}) are over this worker's limit of {limit} tokens")
        with self._changed:
            if self._closed:
                raise RuntimeError("the decode worker is shutting down")
            if admit.id in self._by_id:
                raise ValueError(f"id: {admit.id!r} is already being decoded")
            if not self._draining:
                self._by_id[admit.id] = sequence
                self.outbox.opened(admit.router)
                self.scheduler.add(sequence)
                self._changed.notify_all()
            return self._ack()

    def abort(self, ids: list[str]) -> Ack:
        """Drop sequences; those in a running step leave when it ends. No event is sent for them."""
        with self._changed:
            for sequence in filter(None, map(self._by_id.get, ids)):
                sequence.aborted = True
                if sequence in self.scheduler.waiting:
                    self._leave(sequence)
            self._changed.notify_all()
            return self._ack()

    def drain(self, on: bool = True, evict: bool = False) -> Ack:
        """Take no new sequences, or take them again. evict: drop those that are here; their routers move what they miss."""
        with self._changed:
            self._draining = on
            here = list(self._by_id) if evict else []
        return self.abort(here)

    def stats(self, after: int = 0) -> Stats:
        """The worker's state and the steps since ``after``."""
        with self._changed:
            scheduler = self.scheduler
            return Stats(
                running=len(scheduler.running), waiting=len(scheduler.waiting) + len(scheduler.placed), load=self._load(),
                free_tokens=self.pool.free_tokens, budget_tokens=self.pool.budget, step=self._step,
                steps=[record for record in self._records if record.step > after], draining=self._draining, module=self.module)

    def progress(self) -> int | None:
        """How many steps it has begun; None if no sequence runs. See `Watchdog`."""
        with self._changed:
            return self._begun if self.scheduler.running else None

    def wait_idle(self, seconds: float) -> bool:
        """Wait until no sequence is here and its router has its end, but no longer than so many seconds; whether it is so."""
        until = time.monotonic() + seconds
        with self._changed:
            ended = self._changed.wait_for(lambda: not self._by_id, seconds)
        return ended and self.outbox.wait_heard(until - time.monotonic())

    def close(self) -> None:
        """Stop at once; sequences still here end with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        with self._changed:
            for sequence in self.scheduler.sequences:
                self._fail(sequence, "the decode worker is shutting down")

    def _ack(self) -> Ack:
        return Ack(load=self._load(), draining=self._draining, module=self.module)

    def _load(self, without: Iterable[Sequence] = ()) -> Load:
        return self.scheduler.load(time.monotonic_ns(), without)

    def _leave(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self._by_id.pop(sequence.admit.id, None)
        self.outbox.closed(sequence.admit.router)

    def _fail(self, sequence: Sequence, error: str) -> None:
        event = TokenEvent(id=sequence.admit.id, finish="error", error=error)
        self.scheduler.remove(sequence)
        self.outbox.put(sequence.admit.router, StepEvents(step=self._step, load=self._load(), events=[event]))
        self._leave(sequence)

    def _pull_loop(self) -> None:
        torch.set_num_threads(1)  # a copy at memory speed; more threads would only take cores from the steps
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._place())
                if self._closed:
                    return
                sequence, self._pulling = self._pulling, None
            error = self._pull(sequence)
            with self._changed:
                if sequence.aborted:
                    self._leave(sequence)
                elif error is not None:
                    self._fail(sequence, error)
                else:
                    self.scheduler.start(sequence)
                self._changed.notify_all()

    def _place(self) -> bool:
        self._pulling = self.scheduler.place()
        return self._pulling is not None

    def _pull(self, sequence: Sequence) -> str | None:
        """Copy a placed sequence's KV into its slot; returns what went wrong."""
        ticket = sequence.ticket
        try:
            with self.pool.beside(), self.transports[ticket.transport].pull(ticket, sequence.shipment) as buffer:
                self.pool.fill(sequence.slot, verified_kv(ticket, buffer))
                if ticket.hidden and not sequence.generated:
                    sequence.hidden = hidden_state(ticket, buffer).to("cpu", copy=True)
        except Exception as error:  # this sequence fails; the worker goes on
            gpu.end_if_lost("the decode worker", self.pool.data.device, error)
            return f"{type(error).__name__}: {error}"
        sequence.shipment = []
        return None

    def _step_loop(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
        while True:
            with self._changed:
                for sequence in [s for s in self.scheduler.running if s.aborted]:
                    self._leave(sequence)
                    self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or self.scheduler.running)
                if self._closed:
                    return
                running = [s for s in self.scheduler.running if not s.aborted]
            self._begun += 1
            if behind := next((s for s in running if s.to_replay), None):
                self._replay(behind)
            if batch := [s for s in running if not s.to_replay]:
                self._run_step(batch)

    def _replay(self, sequence: Sequence) -> None:
        """Run a part of what another worker has sampled through the decode module again: the same bits, whoever computes them."""
        tokens, positions = sequence.replay(REPLAY_ROWS)
        try:
            self.executor.step(tokens, positions, [sequence.slot] * len(tokens))
        except Exception as error:  # this sequence fails; the worker goes on
            gpu.end_if_lost("the decode worker", self.pool.data.device, error)
            with self._changed:
                self._fail(sequence, f"replay failed: {type(error).__name__}: {error}")
                self._changed.notify_all()
        else:
            sequence.replayed += len(tokens)

    def _run_step(self, batch: list[Sequence]) -> None:
        started = time.perf_counter()
        fresh, others = [s for s in batch if s.hidden is not None], [s for s in batch if s.hidden is None]
        batch = fresh + others
        try:
            choices = self._next(fresh, others)
        except Exception as error:  # these sequences fail; the worker goes on
            gpu.end_if_lost("the decode worker", self.pool.data.device, error)
            with self._changed:
                for sequence in batch:
                    self._fail(sequence, f"decode step failed: {type(error).__name__}: {error}")
                self._changed.notify_all()
            return
        with self._changed:
            self._step += 1
            tasks = dict(Counter(s.admit.task for s in batch))
            record = StepRecord(step=self._step, ms=round((time.perf_counter() - started) * 1e3, 3), tasks=tasks)
            self._records.append(record)
            self._report(batch, choices)
        self._stepped(record)

    def _next(self, fresh: list[Sequence], others: list[Sequence]) -> list[Choice]:
        """The next token of each: from what the prefill module has made of xn, or from a step."""
        choices = []
        if fresh:
            choices += self._pick(self.executor.logits(torch.stack([s.hidden for s in fresh])), fresh)
        if others:
            choices += self._pick(self.executor.step([s.last for s in others], [s.position for s in others], [s.slot for s in others]), others)
        return choices

    def _report(self, batch: list[Sequence], choices: list[Choice]) -> None:
        events: dict[str, list[TokenEvent]] = defaultdict(list)
        ended = []
        for sequence, choice in zip(batch, choices, strict=True):
            if sequence.aborted:
                continue
            sequence.generated.append(choice.token)
            sequence.hidden = None
            finish = sequence.finish_reason()
            events[sequence.admit.router].append(TokenEvent(
                id=sequence.admit.id, token=choice.token, logprob=choice.logprob, top=choice.top, finish=finish))
            if finish:
                ended.append(sequence)
        load = self._load(ended)
        for router, tokens in events.items():
            if not self.outbox.put(router, StepEvents(step=self._step, load=load, events=tokens)):
                for sequence in batch:
                    sequence.aborted = sequence.aborted or sequence.admit.router == router
        for sequence in ended:
            self._leave(sequence)
        if ended:
            self._changed.notify_all()


@torch.inference_mode()
def choose(logits: Tensor, batch: list[Sequence]) -> list[Choice]:
    """Pick every sequence's next token from logits [batch, vocab]; all greedy rows in one call."""
    raw = logits
    changed = [i for i, s in enumerate(batch) if s.admit.params.penalised or s.banned()]
    if changed:
        logits = logits.clone()
        for i in changed:
            if batch[i].admit.params.penalised:
                logits[i] = penalise(logits[i], batch[i].admit.params, *batch[i].ids())
            logits[i, batch[i].banned()] = -torch.inf
    tokens = logits.argmax(dim=-1).tolist()
    choices = []
    for i, sequence in enumerate(batch):
        params = sequence.admit.params
        token = tokens[i] if params.temperature == 0 else draw(logits[i], params, sequence.position)
        choices.append(Choice(token) if params.logprobs is None else logprobs(raw[i], token, params.logprobs))
    return choices
