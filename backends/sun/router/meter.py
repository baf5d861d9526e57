"""What is counted and timed, by names that the field knows (vLLM's, with OpenTelemetry's units)."""

from __future__ import annotations

from typing import NamedTuple, Protocol

TIMES_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
STEPS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
GAPS_S = (*STEPS_S, 5.0, 10.0, 30.0)
HANDOFFS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metric(NamedTuple):
    """What a metric is, its labels, and a histogram's buckets."""

    text: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()


GAPS = "sun_inter_token_latency_seconds"
METRICS: dict[str, Metric] = {
    "sun_request_success_total": Metric("Requests that ended well", ("task", "finished_reason")),
    "sun_request_failure_total": Metric("Requests that ended with an error", ("task", "reason")),
    "sun_request_refused_total": Metric("Requests that ended before their prefill began: refused, cancelled or too late", ("reason",)),
    "sun_time_to_first_token_seconds": Metric("From a request's arrival to its first token", ("task",), TIMES_S),
    "sun_time_per_output_token_seconds": Metric("A request's mean time between tokens", ("task",), STEPS_S),
    f"{GAPS}_bucket": Metric("The time between two tokens of a request as the router sees them, a move to another worker included", ("task", "le")),
    f"{GAPS}_sum": Metric("Seconds of all times between two tokens", ("task",)),
    f"{GAPS}_count": Metric("How many times between two tokens there were", ("task",)),
    "sun_e2e_request_latency_seconds": Metric("From a request's arrival to its end", ("task",), TIMES_S),
    "sun_request_queue_time_seconds": Metric("From a request's arrival to the begin of its prefill", ("task",), TIMES_S),
    "sun_request_prefill_time_seconds": Metric("A prefill's time, its queue included", ("task",), TIMES_S),
    "sun_handoff_seconds": Metric("From a prompt's KV being there to a decode worker having the sequence", ("task",), HANDOFFS_S),
    "sun_request_prompt_tokens": Metric("Tokens of a prompt", ("task",), TOKENS),
    "sun_request_generation_tokens": Metric("Tokens of an answer", ("task",), TOKENS),
    "sun_handoff_bytes_total": Metric("KV shipped from prefill to decode", ("task",)),
    "sun_failover_total": Metric("Sequences that another worker took over, by the worker that lost them", ("worker",)),
    "sun_key_requests_total": Metric("Requests that ended, by the key they came with; outcome: a finish reason or an error's code", ("key", "outcome")),
    "sun_key_tokens_total": Metric("Tokens of prompts and answers", ("key",)),
    "sun_records_lost_total": Metric("Requests that are missing in the request log or the exported spans", ("sink",)),
    "sun_num_requests_running": Metric("Requests in flight that a worker has", ("task",)),
    "sun_num_requests_waiting": Metric("Requests in flight that no worker has yet", ("task",)),
    "sun_kv_cache_usage_ratio": Metric("Share of the KV pool's tokens that is taken", ("worker",)),
    "sun_prefill_up": Metric("1 while a task's prefill module has a process, NaN once the task is removed", ("task",)),
    "sun_worker_up": Metric("1 while a decode worker answers", ("worker",)),
    "sun_worker_outstanding_tokens": Metric("Tokens that a worker's sequences may still generate", ("worker",)),
}
"""The router's, by name. What has no buckets is a counter if its name ends as in `COUNTERS`, otherwise a gauge."""
WORKER_METRICS: dict[str, Metric] = {
    "sun_decode_step_seconds": Metric("A decode step's time: the time between two tokens of all its sequences", ("worker",), STEPS_S),
    "sun_decode_batch_size": Metric("Sequences in a decode step", ("worker",), (1, 2, 4, 8, 16, 32, 64, 128)),
    "sun_decode_batch_tasks": Metric("Different tasks in a decode step", ("worker",), (1, 2, 4, 8, 16, 32)),
}
"""A decode worker's."""
COUNTERS = ("_total", "_bucket", "_sum", "_count")
"""The last three are parts of a histogram that is counted by the router itself; see `sun.router.gaps`."""


class Meter(Protocol):
    """Where figures go. Calls return at once and never raise."""

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Count up a counter, or note a histogram's value."""

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""


class NoMeter:
    """Forgets everything."""

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """See `Meter.add`."""

    def set(self, name: str, value: float, **labels: str) -> None:
        """See `Meter.set`."""
