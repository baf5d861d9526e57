"""What happened to one request: the facts that its figures, its log line and its spans are made of."""

from __future__ import annotations

import time
from collections.abc import Callable

from sun.router.errors import RequestError
from sun.router.meter import Meter, NoMeter


class Record:
    """One request's facts. Moments are seconds of the monotonic clock, None for what has not happened; `arrived_ns` is that of Unix time.

    id: ours; request_id: what the client calls it, "" if it does not. asked: the task that it named; task: the same, once it is known
    to be one. handed_over: it came with the KV of its prompt. ended(record) is called once, when all of it is known; gap(task, seconds)
    with the time between two tokens.
    """

    def __init__(self, id: str, meter: Meter = NoMeter(), ended: Callable[[Record], None] = lambda record: None,
                 gap: Callable[[str, float], None] = lambda task, seconds: None):
        self.id, self._meter, self._gap = id, meter, gap
        self._told: Callable[[Record], None] | None = ended
        self.request_id = self.asked = self.task = self.key = self.outcome = ""
        self.messages: list[dict] = []
        self.trace: dict[str, str] = {}
        self.error: RequestError | None = None
        self.handed_over = False
        self.prompt = self.tokens = 0
        self.workers: list[str] = []
        self.arrived, self.arrived_ns = time.monotonic(), time.time_ns()
        self.began: float | None = None
        self.prefilled: float | None = None
        self.placed: float | None = None
        self.first: float | None = None
        self.last: float | None = None
        self.ended: float | None = None

    @property
    def queue_s(self) -> float | None:
        """From the arrival to the begin of the prefill."""
        return self._span(self.arrived, self.began)

    @property
    def prefill_s(self) -> float | None:
        """The prefill's time, its own queue included."""
        return self._span(self.began, self.prefilled)

    @property
    def shipped(self) -> float | None:
        """The moment from which its KV was there for a worker to take."""
        return self.began if self.handed_over else self.prefilled

    @property
    def handoff_s(self) -> float | None:
        """From its KV being there to a worker having it; a later move to another worker is not in it."""
        return self._span(self.shipped, self.placed)

    @property
    def ttft_s(self) -> float | None:
        """From the arrival to the first token."""
        return self._span(self.arrived, self.first)

    @property
    def tpot_s(self) -> float | None:
        """The mean time between tokens; None for fewer than two."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def total_s(self) -> float | None:
        """From the arrival to the end."""
        return self._span(self.arrived, self.ended)

    @property
    def moves(self) -> int:
        """How often another worker took it over."""
        return max(0, len(self.workers) - 1)

    def queue(self, task: str, prompt: int) -> None:
        """It is a request of this task, with a prompt of so many tokens, and waits."""
        self.task, self.prompt = task, prompt
        self._meter.add("sun_request_prompt_tokens", prompt, task=task)

    def begin(self) -> None:
        """It waits no longer. One that has to be prefilled again says so again, and had begun before."""
        if self.began is None:
            self.began = time.monotonic()
            self._meter.add("sun_request_queue_time_seconds", self.queue_s, task=self.task)

    def prefill(self, kv_bytes: int) -> None:
        """The prompt's KV is there."""
        self.prefilled = time.monotonic()
        self._meter.add("sun_request_prefill_time_seconds", self.prefill_s, task=self.task)
        self._meter.add("sun_handoff_bytes_total", kv_bytes, task=self.task)

    def place(self, worker: str) -> None:
        """A worker has it; its first token may have been here before the worker's word of that."""
        self.workers.append(worker)
        if self.placed is None:
            self.placed = time.monotonic() if self.first is None else self.first
            self._meter.add("sun_handoff_seconds", self.handoff_s, task=self.task)

    def token(self) -> None:
        """Another token."""
        before, self.last = self.last, time.monotonic()
        self.tokens += 1
        if before is None:
            self.first = self.last
            self._meter.add("sun_time_to_first_token_seconds", self.ttft_s, task=self.task)
        else:
            self._gap(self.task, self.last - before)

    def finish(self, reason: str) -> None:
        """It ended well."""
        self._meter.add("sun_request_success_total", task=self.task, finished_reason=reason)
        self._end(reason)

    def fail(self, error: RequestError) -> None:
        """It ended with an error."""
        self.error = error
        if self.began is None:
            self._meter.add("sun_request_refused_total", reason=error.code)
        else:
            self._meter.add("sun_request_failure_total", task=self.task, reason=error.code)
        self._end(error.code)

    def _end(self, outcome: str) -> None:
        self.ended, self.outcome = time.monotonic(), outcome
        if self.began is not None:
            self._meter.add("sun_e2e_request_latency_seconds", self.total_s, task=self.task)
            self._meter.add("sun_request_generation_tokens", self.tokens, task=self.task)
        if self.tokens > 1:
            self._meter.add("sun_time_per_output_token_seconds", self.tpot_s, task=self.task)
        if self.key:
            self._meter.add("sun_key_requests_total", key=self.key, outcome=outcome)
            self._meter.add("sun_key_tokens_total", self.prompt + self.tokens, key=self.key)
        told, self._told = self._told, None  # it holds on to the request, which may be large, and the record may wait to be written
        told(self)

    @staticmethod
    def _span(begin: float | None, end: float | None) -> float | None:
        return None if begin is None or end is None else end - begin
