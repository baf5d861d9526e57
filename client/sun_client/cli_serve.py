"""`sun serve` and `sun demo`: what starts a server."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sun_client.cli_options import GrpcPortOption, HttpPortOption, MetricsPortOption, RootOption, check_tls

if TYPE_CHECKING:
    from sun_client.root import Root

WAYS_IN = """\
{tasks}
  {ask}
  curl -s {http}/v2/models/sun/generate -d '{{"task": "{task}", "text_input": "...", "temperature": 0}}'
  curl -sN {http}/v2/models/sun/generate_stream -d '{{"task": "{task}", "text_input": "...", "temperature": 0, "stream": true}}'
  gRPC {grpc}, model sun, or a task's own model   health {http}/v2/health/ready   metrics {metrics}/metrics
{gateway}  log {log}   requests {requests}
Ctrl-C stops it."""


def serve(
    root: RootOption = None, http_port: HttpPortOption = 8000, grpc_port: GrpcPortOption = 8001, metrics_port: MetricsPortOption = 8002,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in, as anybody unless keys are on (`sun key`).")] = "127.0.0.1",
    tls_cert: Annotated[Path | None, typer.Option(
        help="PEM file of a certificate: gRPC is encrypted (clients ask grpcs://...), and HTTP stays on 127.0.0.1, for a proxy with TLS.", show_default=False)] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its private key.", show_default=False)] = None,
    openai_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of OpenAI's API, if it is to be served, too (`sun gateway`).", show_default=False)] = None,
) -> None:
    """Serve all tasks of the repository until Ctrl-C or SIGTERM. What dies meanwhile is started anew."""
    from sun.router.tasks import TaskRegistry
    from sun_client import show
    from sun_client.gateway.child import GatewayProcess
    from sun_client.root import Root
    from sun_client.server import Ports, Server, Tls, interruptible
    from sun_client.supervisor import Supervisor

    check_tls(tls_cert, tls_key)
    place = Root.find(root)
    names = TaskRegistry(place.models).names()
    server = Server(place.path, Ports(http_port, grpc_port, metrics_port), host, Tls(tls_cert, tls_key) if tls_cert else None)
    url = f"{'grpcs://' if tls_cert else ''}{host}:{grpc_port}"
    gateway = GatewayProcess(server, openai_port, _say) if openai_port else None
    if gateway:
        gateway.check()
    with interruptible():
        try:
            _warn(_scarce(place))  # before the start, which may fail for that
            show.start(server)
            if gateway:
                gateway.start()
            _warn(server.warnings())
            task = names[0] if names else "TASK"
            ask = f"sun ask --task {task} \"...\"" + ("" if grpc_port == 8001 and not tls_cert else f" --url {url}")
            print(WAYS_IN.format(
                tasks=f"Serving {', '.join(names)}:" if names else "Serving, but no task yet: `sun setup` or `sun task add` makes one.",
                task=task, ask=ask, http=f"http://{server.http_host}:{http_port}", grpc=url, metrics=f"http://{host}:{metrics_port}",
                gateway=f"  OpenAI's API {gateway.url}   its log {gateway.log}\n" if gateway else "", log=server.log, requests=server.request_log), flush=True)
            supervisor = Supervisor(server, _say)
            while True:
                supervisor.look()
                if gateway:
                    gateway.look()
                time.sleep(0.5)
        except KeyboardInterrupt:
            pass
        finally:
            if gateway:
                gateway.terminate()
            try:
                show.stop(server)
            finally:
                if gateway:
                    gateway.end()
    print("Stopped.")


def _scarce(root: Root) -> Iterator[str]:
    """What there is too little of in shared memory; nothing where that cannot be told, as without a base, which the start says."""
    from sun_client.doctor import Doctor

    with suppress(OSError, ValueError):
        for finding in Doctor(root).shared_memory():
            if finding.state != "ok":
                yield f"{finding.check}: {finding.seen}; {finding.advice}"


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"Warning: {line}", file=sys.stderr, flush=True)


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def demo(
    root: RootOption = None, http_port: HttpPortOption = 8000, grpc_port: GrpcPortOption = 8001, metrics_port: MetricsPortOption = 8002,
) -> None:
    """Start a server, ask all shipped tasks at once, and show that their answers were decoded together."""
    from sun_client.demo import run
    from sun_client.root import Root
    from sun_client.server import Ports, interruptible

    with interruptible():
        sys.exit(run(Root.find(root), Ports(http_port, grpc_port, metrics_port)))
