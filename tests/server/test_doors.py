"""A server with inference keys and TLS: every way in asks for a key, and each request is in the log and in the client's trace."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import requests
import trustme
import tritonclient.grpc as grpcclient

from sun.handoff.shm import default_root
from sun.messages import Abort, encode
from sun_build.tasks import add_task
from sun_client.client import SunClient
from sun_client.errors import SunError
from sun_client.gateway.serve import context
from sun_client.metrics import read, total
from sun_client.server import Server, Tls
from tests.server.conftest import free_ports, gateway, make_root, sun, wait_until

SHORT = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}
BODY = {"text_input": "hello", "task": "identity", "temperature": 0, "max_tokens": 2}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OTEL = importlib.util.find_spec("opentelemetry") is not None and importlib.util.find_spec("opentelemetry.exporter") is not None


class Collector(BaseHTTPRequestHandler):
    """An OTLP receiver that keeps what is posted."""

    posted: list[bytes] = []

    def do_POST(self) -> None:  # noqa: N802 - http.server's name
        self.posted.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Keep quiet."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """One worker, one task, and keys asked for."""
    root = make_root(tmp_path_factory.mktemp("doors") / "sun")
    shutil.rmtree(root / "model_repository" / "decode_1")
    add_task(root / "model_repository", root / "build" / "base", "identity")
    with (root / "model_repository" / "sun" / "config.pbtxt").open("a") as config:
        config.write('parameters { key: "keys" value { string_value: "keys.json" } }\n')
    return root


@pytest.fixture(scope="module")
def key(root: Path) -> str:
    """A key without bounds."""
    return sun("key", "add", "alice", "--root", str(root)).strip()


@pytest.fixture(scope="module")
def tls(root: Path) -> Tls:
    """A certificate for 127.0.0.1, whose authority is ca.pem beside it."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(root / "ca.pem")
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(root / "server.pem")
    certificate.private_key_pem.write_to_path(root / "server.key")
    return Tls(root / "server.pem", root / "server.key")


@pytest.fixture(scope="module")
def guarded(root: Path, key: str, tls: Tls) -> Iterator[Server]:
    """The server, which exports its spans to `Collector`."""
    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        patch.setenv("SUN_TLS_CA", str(root / "ca.pem"))
        with Server(root, free_ports(), tls=tls) as server:
            yield server
    collector.shutdown()
    collector.server_close()
    assert server.leftovers() == []


@pytest.fixture
def url(guarded: Server) -> str:
    """Its gRPC endpoint."""
    return f"grpcs://127.0.0.1:{guarded.ports.grpc}"


def line_of(server: Server, request_id: str) -> dict:
    """The line of a request in the server's request log."""
    found: list[dict] = []

    def there() -> bool:
        found[:] = [line for line in map(json.loads, server.request_log.read_text().splitlines()) if line["request_id"] == request_id]
        return bool(found)

    assert wait_until(there)
    assert len(found) == 1
    return found[0]


def text(name: str, *values: str | bytes) -> grpcclient.InferInput:
    """An input tensor of texts."""
    tensor = grpcclient.InferInput(name, [len(values)], "BYTES")
    return tensor.set_data_from_numpy(np.array([value.encode() if isinstance(value, str) else value for value in values], dtype=np.object_))


def stream(url: str, model: str, inputs: list, headers: dict[str, str] | None = None) -> str | None:
    """The error of a gRPC stream request by tritonclient, None if it was answered."""
    seen = []
    with grpcclient.InferenceServerClient(url.removeprefix("grpcs://"), ssl=True, root_certificates=os.environ["SUN_TLS_CA"]) as client:
        client.start_stream(lambda result, error: seen.append(error), headers=headers)
        client.async_stream_infer(model, inputs)
        client.stop_stream()
    return seen[0] and seen[0].message()


def test_a_key_opens_sun_over_grpc_and_http_and_nothing_else_does(guarded, url, key):
    asked = [text("task", "identity"), text("text_input", "hello"), text("sampling_parameters", json.dumps(SHORT))]
    generate = f"http://127.0.0.1:{guarded.ports.http}/v2/models/sun/generate"
    assert stream(url, "sun", asked, {"authorization": f"Bearer {key}"}) is None
    assert requests.post(generate, json={**BODY, "api_key": key}).status_code == 200
    for wrong in ("", "sun-wrong", key[:-1]):
        refused = requests.post(generate, json={**BODY, "api_key": wrong})
        assert refused.status_code == 400 and refused.json()["error"].startswith("api_key: a valid key is needed")
        assert stream(url, "sun", asked, {"authorization": f"Bearer {wrong}"}).startswith("api_key: a valid key is needed")
    assert requests.post(generate, json=BODY).json() == refused.json(), "a missing key is told nothing else"


def test_nobody_talks_to_grpc_without_tls_or_trusts_a_stranger_s_certificate(guarded, url, key, monkeypatch):
    with SunClient(url.removeprefix("grpcs://"), key) as client, pytest.raises(SunError):
        client.generate("identity", "hello", sampling=SHORT, timeout=10)
    monkeypatch.delenv("SUN_TLS_CA")
    with SunClient(url, key) as client, pytest.raises(SunError, match="^no encrypted connection to grpcs://.*SUN_TLS_CA"):
        client.generate("identity", "hello", sampling=SHORT, timeout=10)
    monkeypatch.setenv("SUN_TLS_CA", "/none.pem")
    with pytest.raises(SunError, match="^SUN_TLS_CA: /none.pem: No such file"):
        SunClient(url, key)


def test_the_doors_behind_the_router_are_shut_for_everybody(guarded, url, key):
    http = f"http://127.0.0.1:{guarded.ports.http}/v2/models"
    for more in ({}, {"api_key": key}, {"sun_door": key}):
        assert "answers `sun` alone" in requests.post(f"{http}/identity/generate", json={"text_input": "hello", **more}).json()["error"]
        infer = {"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [2], "data": [1, 2]}], "parameters": more}
        assert "answers `sun` alone" in requests.post(f"{http}/prefill_identity/infer", json=infer).json()["error"]
    assert "answers `sun` alone" in stream(url, "decode_0", [text("message", encode(Abort(ids=["x"])))])
    with SunClient(url, key) as client:
        assert client.workers() == ["decode_0"] and client.worker_stats("decode_0").running == 0, "for `sun stats`"
    assert not [path for path in default_root().glob("*/*") if path.name != ".lock"], "no ticket was made"


def test_keys_come_and_go_while_the_server_runs_and_limits_say_when_to_come_back(guarded, url, root):
    bob = sun("key", "add", "bob", "--requests-per-minute", "2", "--tasks", "identity", "--root", str(root)).strip()
    assert "bob" in sun("key", "list", "--root", str(root)) and bob not in (root / "keys.json").read_text()
    with SunClient(url, bob) as client:
        def answered() -> bool:
            try:
                return bool(client.generate("identity", "hello", sampling=SHORT))
            except SunError as error:
                assert "api_key: " in str(error)
                return False

        assert wait_until(answered)
        assert client.generate("identity", "hello", sampling=SHORT).token_ids
        with pytest.raises(SunError, match="^requests_per_minute: ") as error:
            client.generate("identity", "hello", sampling=SHORT)
        assert 1 <= error.value.retry_after_s <= 30
        with pytest.raises(SunError, match="^task: this key may ask identity"):
            client.generate("bash", "hello")
        sun("key", "remove", "bob", "--root", str(root))
        time.sleep(1.1)
        with pytest.raises(SunError, match="^api_key: "):
            client.generate("identity", "hello", sampling=SHORT)
    metrics = f"127.0.0.1:{guarded.ports.metrics}"
    assert wait_until(lambda: total(read(metrics), "sun_key_requests_total", key="bob", outcome="length") == 2)
    assert total(read(metrics), "sun_key_requests_total", key="bob", outcome="UNAVAILABLE") == 1


def test_the_gateway_passes_the_bearer_s_key_on_and_has_none_of_its_own(url, key, root, tls, monkeypatch):
    monkeypatch.setenv("SUN_API_KEY", key)
    carol = sun("key", "add", "carol", "--requests-per-minute", "1", "--tasks", "identity", "--root", str(root)).strip()
    body = {"model": "identity", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, "temperature": 0}
    with gateway(url, context(tls.certificate, tls.key)) as address, requests.Session() as session:
        session.verify, session.trust_env = str(root / "ca.pem"), False

        def ask(key: str | None, **more: object) -> requests.Response:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            return session.post(f"{address}/v1/chat/completions", json={**body, **more}, headers=headers)

        assert ask(key).status_code == 200
        for wrong in (None, "", "sun-wrong"):
            refused = ask(wrong, stream=True)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert wait_until(lambda: ask(carol).status_code == 200)
        full = ask(carol)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "rate_limit_exceeded") and 1 <= int(full.headers["Retry-After"]) <= 60
        other = ask(carol, model="bash")
        assert (other.status_code, other.json()["error"]["param"]) == (403, "model")
        assert session.get(f"{address}/health").status_code == 200


def test_sun_ask_takes_the_key_from_the_environment_and_its_request_is_in_the_log(guarded, url, key):
    words = [sys.executable, "-m", "sun_client.cli", "ask", "--task", "identity", "--max-tokens", "4", "--url", url, "--json", "tell me a secret"]
    refused = subprocess.run(words, capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k != "SUN_API_KEY"})
    assert refused.returncode == 1 and "api_key: " in refused.stderr
    answer = json.loads(subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, "SUN_API_KEY": key}).stdout)
    line = line_of(guarded, answer["request_id"])
    assert (line["key"], line["task"], line["finish_reason"]) == ("alice", "identity", answer["finish_reason"])
    assert (line["prompt_tokens"], line["output_tokens"]) == (answer["num_input_tokens"], answer["num_output_tokens"])
    assert line["workers"] == ["decode_0"] and 0 < line["ttft_ms"] <= line["total_ms"]
    written = guarded.request_log.read_text() + guarded.log.read_text(errors="replace")
    assert "secret" not in written and key not in written


@pytest.mark.skipif(not OTEL, reason="pip install sun-triton[otel]")
@pytest.mark.parametrize("way", ["parameter", "metadata"])
def test_a_request_is_part_of_the_clients_trace(guarded, url, key, way):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    trace = TRACE[:-1] + {"parameter": "1", "metadata": "2"}[way]
    header = f"00-{trace}-{PARENT}-01"
    if way == "parameter":
        with SunClient(url, key) as client:
            client.generate("identity", "hello", sampling=SHORT, traceparent=header)
    else:
        asked = [text("task", "identity"), text("text_input", "hello"), text("sampling_parameters", json.dumps(SHORT))]
        assert stream(url, "sun", asked, {"authorization": f"Bearer {key}", "traceparent": header}) is None

    def spans() -> dict:
        found = [ExportTraceServiceRequest.FromString(body) for body in list(Collector.posted)]
        every = [span for one in found for resource in one.resource_spans for scope in resource.scope_spans for span in scope.spans]
        return {span.name: span for span in every if span.trace_id.hex() == trace}

    assert wait_until(lambda: len(spans()) == 5)
    assert spans().keys() == {"chat identity", "queue", "prefill", "handoff", "decode"}
    assert spans()["chat identity"].parent_span_id.hex() == PARENT
