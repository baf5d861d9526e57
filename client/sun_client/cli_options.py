"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RootOption = Annotated[Path | None, typer.Option(
    "--root", help="Folder with model_repository/ and build/. Default: the checkout sun is installed from, else the working directory.",
    show_default=False)]
UrlOption = Annotated[str, typer.Option("--url", help="host:port of the server's gRPC endpoint; grpcs://host:port with TLS.")]
HttpPortOption = Annotated[int, typer.Option("--http-port", min=1, max=65535, help="Port of HTTP (generate, generate_stream, health).")]
GrpcPortOption = Annotated[int, typer.Option("--grpc-port", min=1, max=65535, help="Port of gRPC (what `sun ask` uses).")]
MetricsPortOption = Annotated[int, typer.Option("--metrics-port", min=1, max=65535, help="Port of the Prometheus metrics.")]


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """Raise ValueError if there is one of --tls-cert and --tls-key alone."""
    if (certificate is None) != (key is None):
        raise ValueError("tls-cert and tls-key: one is of no use without the other")
