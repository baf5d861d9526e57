"""What is counted and timed, by names that the field knows (vLLM's, with OpenTelemetry's units)."""

from __future__ import annotations

from typing import Protocol

TIMES_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
STEPS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096)
METRICS: dict[str, tuple[str, tuple[float, ...]]] = {
    "sun_request_success_total": ("Requests that ended well, by task and finished_reason", ()),
    "sun_request_failure_total": ("Requests that ended with an error, by task and reason", ()),
    "sun_request_refused_total": ("Requests that ended before their prefill began: refused, cancelled or too late, by reason", ()),
    "sun_time_to_first_token_seconds": ("From a request's arrival to its first token, by task", TIMES_S),
    "sun_time_per_output_token_seconds": ("A request's mean time between tokens, by task", STEPS_S),
    "sun_e2e_request_latency_seconds": ("From a request's arrival to its end, by task", TIMES_S),
    "sun_request_queue_time_seconds": ("From a request's arrival to the begin of its prefill, by task", TIMES_S),
    "sun_request_prefill_time_seconds": ("A prefill's time, its queue included, by task", TIMES_S),
    "sun_request_prompt_tokens": ("Tokens of a prompt, by task", TOKENS),
    "sun_request_generation_tokens": ("Tokens of an answer, by task", TOKENS),
    "sun_handoff_bytes_total": ("KV shipped from prefill to decode, by task", ()),
    "sun_failover_total": ("Sequences that another worker took over, by the worker that lost them", ()),
    "sun_key_requests_total": ("Requests that ended, by the key they came with and outcome: a finish reason or an error's code", ()),
    "sun_key_tokens_total": ("Tokens of prompts and answers, by key", ()),
    "sun_records_lost_total": ("Requests that are missing in the request log or the exported spans, by where", ()),
    "sun_num_requests_running": ("Requests in flight that a worker has, by task", ()),
    "sun_num_requests_waiting": ("Requests in flight that no worker has yet, by task", ()),
    "sun_kv_cache_usage_ratio": ("Share of the KV pool's tokens that is taken, by worker", ()),
    "sun_prefill_up": ("1 while a task's prefill module has a process, NaN once the task is removed, by task", ()),
    "sun_worker_up": ("1 while a decode worker answers, by worker", ()),
    "sun_worker_outstanding_tokens": ("Tokens that a worker's sequences may still generate, by worker", ()),
}
"""Name -> what it is, and a histogram's buckets. A `_total` is a counter, what has no buckets otherwise a gauge."""


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
