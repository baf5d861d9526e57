"""A proxy that the environment names is not asked for what runs on this machine."""

from __future__ import annotations

import asyncio
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import pytest

from sun_client import metrics
from sun_client.client import SunClient
from sun_client.control import Control
from sun_client.errors import SunError
from sun_client.gateway.upstream import Upstream
from sun_client.server import answers

NOBODY = "http://127.0.0.1:1"


@pytest.fixture(autouse=True)
def proxied(monkeypatch):
    """An environment whose proxy does not answer, for all addresses."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, NOBODY)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # the first call in a process reads the environment for all


@pytest.fixture
def port() -> Iterator[int]:
    """Of an HTTP server that answers all with a metric."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"sun_worker_up 1\n")

        def do_POST(self):
            self.send_error(400, "not a worker")

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_over_http(port):
    assert answers("127.0.0.1", port) is True
    assert metrics.total(metrics.read(f"localhost:{port}"), "sun_worker_up") == 1
    with pytest.raises(SunError, match="not a worker"):
        Control(1, "127.0.0.1", port, "key").stats("decode_0")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_over_grpc(host):
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()

    async def tasks():
        upstream = Upstream(f"{host}:{port}")
        try:
            await upstream.tasks()
        finally:
            await upstream.close()

    try:
        with SunClient(f"{host}:{port}") as client, pytest.raises(SunError) as answered:
            client.workers(timeout=20.0)
        assert answered.value.code == "UNIMPLEMENTED"  # it is no Triton, but it was reached
        with pytest.raises(SunError) as answered:
            asyncio.run(tasks())
        assert answered.value.code == "UNIMPLEMENTED"
    finally:
        server.stop(None)
