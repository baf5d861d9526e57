"""gRPC's own errors, as whoever answers in the server's place may send them, are errors that a person can read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

from sun_client.client import SunClient
from sun_client.errors import SunError


class Refusing(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Ends each stream with ``code``."""

    code = grpc.StatusCode.OK

    def ModelStreamInfer(self, requests, context):
        """See Triton's service."""
        context.abort(self.code, "of a proxy")
        yield


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Where it listens."""
    server = grpc.server(ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Refusing(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_has_its_code_with_and_without_a_timeout(url, monkeypatch, code, timeout):
    monkeypatch.setattr(Refusing, "code", code)
    with SunClient(url) as client, pytest.raises(SunError) as error:
        client.generate("bash", "hello", timeout=timeout)
    assert error.value.code == code.name and str(error.value)
