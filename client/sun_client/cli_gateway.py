"""`sun gateway`: OpenAI's API in front of a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sun_client import URL
from sun_client.cli_options import UrlOption, check_tls


def gateway(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in, as anybody unless keys are on (`sun key`).")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8080,
    url: UrlOption = URL,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file of a certificate: HTTP is encrypted.", show_default=False)] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its private key.", show_default=False)] = None,
    connections: Annotated[int, typer.Option(min=1, help="Open connections at most; a further one is told 503.")] = 512,
    grace: Annotated[float, typer.Option(min=0.0, help="Seconds that answers get to end after SIGTERM or Ctrl-C; a second one ends them.")] = 30.0,
) -> None:
    """Speak OpenAI's API: chat completions for every task of the server at --url. It may start before that server does."""
    import asyncio

    from sun_client.gateway.serve import context, serve

    check_tls(tls_cert, tls_key)
    tls = context(tls_cert, tls_key) if tls_cert and tls_key else None

    def say(port: int) -> None:
        print(f"OpenAI's API at http{'s' if tls else ''}://{host}:{port}/v1, for the server at {url}. Ctrl-C stops it.", flush=True)

    asyncio.run(serve(url, host, port, tls, grace, connections, say))
