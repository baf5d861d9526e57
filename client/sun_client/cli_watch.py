"""`sun top` and `sun doctor`: looking at a server, and at a machine."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table

from sun_client.cli_options import GrpcPortOption, HttpPortOption, MetricsPortOption, RootOption
from sun_client.metrics import Metrics, label_values, read, total

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def doctor(
    root: RootOption = None, http_port: HttpPortOption = 8000, grpc_port: GrpcPortOption = 8001, metrics_port: MetricsPortOption = 8002,
) -> None:
    """Check an installation: versions, Triton, weights' digests, shared memory, ports, formats, GPU; and say what to do. Exit code 1 if it cannot serve."""
    from sun_client.doctor import Doctor
    from sun_client.root import Root
    from sun_client.server import Ports
    from sun_client.show import quiet_libraries

    table = Table("check", "", "seen", "what to do")
    states = set()
    with quiet_libraries():
        for finding in Doctor(Root.find(root), Ports(http_port, grpc_port, metrics_port)).run():
            table.add_row(finding.check, finding.state, finding.seen, finding.advice, style=STYLES[finding.state] if finding.state != "ok" else None)
            states.add(finding.state)
    Console(highlight=False).print(table)
    sys.exit(1 if "error" in states else 0)


def top(
    url: Annotated[str, typer.Option("--url", help="host:port of the server's metrics.")] = "localhost:8002",
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one look, of the time since the server's start, and end.")] = False,
) -> None:
    """Watch a running server: its workers, their batches, and every task's requests, tokens and times since the last look. Ctrl-C ends it."""
    console = Console(highlight=False)
    if once:
        console.print(tables(read(url), {}, None))
        return
    before, seen = read(url), time.monotonic()
    with Live(tables(before, {}, None), console=console, screen=console.is_terminal, refresh_per_second=4) as live:
        while True:
            time.sleep(every)
            now, at = read(url), time.monotonic()
            live.update(tables(now, before, at - seen))
            before, seen = now, at


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

    numbers = lambda *names: (Column(name, justify="right") for name in names)  # noqa: E731
    workers = Table("worker", *numbers("up", "tokens to come", "KV used", "steps", "ms/step", "sequences/step", "tasks/step"))
    for worker in label_values(now, "worker"):
        batch, tasks = mean("sun_decode_batch_size", worker=worker), mean("sun_decode_batch_tasks", worker=worker)
        up = total(now, "sun_worker_up", worker=worker)
        workers.add_row(
            worker, "yes" if up else "no", f"{total(now, 'sun_worker_outstanding_tokens', worker=worker):.0f}",
            f"{total(now, 'sun_kv_cache_usage_ratio', worker=worker):.0%}", rate(grown("sun_decode_step_seconds_count", worker=worker)),
            ms(mean("sun_decode_step_seconds", worker=worker)), "-" if batch is None else f"{batch:.1f}", "-" if tasks is None else f"{tasks:.1f}",
            style=None if up else STYLES["error"])
    tasks = Table("task", *numbers("running", "waiting", "ended", "failed", "tokens in", "tokens out", "queue ms", "TTFT ms", "TPOT ms"))
    for task in label_values(now, "task"):
        tasks.add_row(
            task, *(f"{total(now, f'sun_num_requests_{state}', task=task):.0f}" for state in ("running", "waiting")),
            rate(grown("sun_request_success_total", task=task)), rate(grown("sun_request_failure_total", task=task)),
            rate(grown("sun_request_prompt_tokens_sum", task=task)), rate(grown("sun_request_generation_tokens_sum", task=task)),
            ms(mean("sun_request_queue_time_seconds", task=task)), ms(mean("sun_time_to_first_token_seconds", task=task)),
            ms(mean("sun_time_per_output_token_seconds", task=task)))
    refused, moved = grown("sun_request_refused_total"), grown("sun_failover_total")
    return Group(workers, tasks, f"refused: {rate(refused)}   moved to another worker: {rate(moved)}")
