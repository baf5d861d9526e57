"""`sun top` and `sun doctor`: looking at a server, and at a machine."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from sun_client.cli_options import GrpcPortOption, HttpPortOption, MetricsPortOption, RootOption

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def doctor(
    root: RootOption = None, http_port: HttpPortOption = 8000, grpc_port: GrpcPortOption = 8001, metrics_port: MetricsPortOption = 8002,
) -> None:
    """Check an installation: versions, Triton, weights' digests, shared memory, ports, formats, GPU; and say what to do. Exit code 1 if it cannot serve."""
    from rich.table import Table

    from sun_client import show
    from sun_client.doctor import Doctor
    from sun_client.root import Root
    from sun_client.server import Ports

    table = Table("check", "", "seen", "what to do")
    states = set()
    with show.quiet_libraries():
        for finding in Doctor(Root.find(root), Ports(http_port, grpc_port, metrics_port)).run():
            table.add_row(finding.check, finding.state, finding.seen, finding.advice, style=STYLES[finding.state] if finding.state != "ok" else None)
            states.add(finding.state)
    show.console.print(table)
    sys.exit(1 if "error" in states else 0)


def top(
    url: Annotated[str, typer.Option("--url", help="host:port of the server's metrics.")] = "localhost:8002",
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one look, of the time since the server's start, and end.")] = False,
) -> None:
    """Watch a running server: its workers, their batches, and every task's requests, tokens and times since the last look. Ctrl-C ends it."""
    from rich.live import Live

    from sun_client.metrics import read
    from sun_client.show import console
    from sun_client.top import tables

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
