"""A server that is loading says so; one that hangs says nothing."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from sun_client.server import answers, ready


@pytest.mark.parametrize(("status", "said"), [(200, True), (400, False), (503, False)])
def test_what_a_server_says_is_told(status, said):
    class Health(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert answers("127.0.0.1", server.server_port) is said and ready("127.0.0.1", server.server_port) is said
        server.shutdown()


def test_silence_is_told_from_no():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert answers("127.0.0.1", port) is None and not ready("127.0.0.1", port)


def test_what_is_no_http_server_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as other:
        def speak() -> None:
            with other.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-x\r\n")

        threading.Thread(target=speak, daemon=True).start()
        assert answers("127.0.0.1", other.getsockname()[1]) is None
