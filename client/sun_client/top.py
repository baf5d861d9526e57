"""What `sun top` shows: workers and tasks, of what happened between two readings of a server's metrics."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Column, Table

from sun_client.metrics import Metrics, label_values, total


def table(name: str, *columns: str | Column) -> Table:
    """A table for a terminal of 80 columns: a long name is folded, and nothing is cut."""
    return Table(Column(name, overflow="fold"), *columns, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)


def numbers(*names: str) -> Iterator[Column]:
    """Columns of numbers; a name of several words has a line for each."""
    return (Column(name.replace(" ", "\n"), justify="right", no_wrap=True) for name in names)


def tables(now: Metrics, before: Metrics, seconds: float | None) -> Group:
    """Workers and tasks, of what happened between two readings; seconds: between them, None if ``before`` is the server's start."""

    def grown(name: str, **labels: str) -> float:
        return total(now, name, **labels) - total(before, name, **labels)

    def mean(name: str, **labels: str) -> float | None:
        count = grown(f"{name}_count", **labels)
        return grown(f"{name}_sum", **labels) / count if count else None

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value * 1e3:.0f}"

    def rate(value: float) -> str:
        return f"{value / seconds:.1f}/s" if seconds else f"{value:.0f}"

    workers = table("worker", *numbers("up", "tokens to come", "KV used", "steps", "ms/step", "sequences /step", "tasks /step"))
    for worker in label_values(now, "worker"):
        batch, tasks = mean("sun_decode_batch_size", worker=worker), mean("sun_decode_batch_tasks", worker=worker)
        up = total(now, "sun_worker_up", worker=worker)
        workers.add_row(
            worker, "yes" if up else "no", f"{total(now, 'sun_worker_outstanding_tokens', worker=worker):.0f}",
            f"{total(now, 'sun_kv_cache_usage_ratio', worker=worker):.0%}", rate(grown("sun_decode_step_seconds_count", worker=worker)),
            ms(mean("sun_decode_step_seconds", worker=worker)), "-" if batch is None else f"{batch:.1f}", "-" if tasks is None else f"{tasks:.1f}",
            style=None if up else "bold red")
    tasks = table("task", *numbers("running", "waiting", "ended", "failed", "tokens in", "tokens out", "queue ms", "TTFT ms", "TPOT ms"))
    for task in label_values(now, "task"):
        tasks.add_row(
            task, *(f"{total(now, f'sun_num_requests_{state}', task=task):.0f}" for state in ("running", "waiting")),
            rate(grown("sun_request_success_total", task=task)), rate(grown("sun_request_failure_total", task=task)),
            rate(grown("sun_request_prompt_tokens_sum", task=task)), rate(grown("sun_request_generation_tokens_sum", task=task)),
            ms(mean("sun_request_queue_time_seconds", task=task)), ms(mean("sun_time_to_first_token_seconds", task=task)),
            ms(mean("sun_time_per_output_token_seconds", task=task)))
    refused, moved = grown("sun_request_refused_total"), grown("sun_failover_total")
    return Group(workers, "", tasks, f"\nrefused: {rate(refused)}   moved to another worker: {rate(moved)}")
