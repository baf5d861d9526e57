"""A request as OpenTelemetry spans: queue, prefill, handoff and decode in it, below the client's own."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from sun.router.reports import Reports
from sun.router.spans import ENDPOINTS, PATH, Spans, otlp_spans

from .harness import TEXT, eventually, within
from .test_meter import Kept

pytest.importorskip("opentelemetry.sdk", reason="pip install sun-triton[otel]")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install sun-triton[otel]")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"trace": {"traceparent": f"00-{TRACE}-{PARENT}-01"}}
STAGES = ["queue", "prefill", "handoff", "decode"]


@pytest.fixture
def kept():
    """What was exported, and a router's `told` that exports it there."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    reports = Reports([Spans(SimpleSpanProcessor(exporter))], Kept())
    yield exporter, reports.note
    within(reports.close)


def of(exporter, count: int) -> list:
    eventually(lambda: len(exporter.get_finished_spans()) == count)
    return list(exporter.get_finished_spans())


def test_a_request_is_a_span_below_the_clients_with_its_stages_end_to_end(serve, kept):
    exporter, told = kept
    piece = serve(told=told).ask(TEXT, "lora", max_tokens=9, ignore_eos=True, more={"id": "mine-1", **TRACEPARENT}).whole
    *stages, whole = of(exporter, 5)
    assert f"{whole.context.trace_id:032x}" == TRACE and f"{whole.parent.span_id:016x}" == PARENT and whole.name == "chat lora"
    assert [span.name for span in stages] == STAGES and {span.parent.span_id for span in stages} == {whole.context.span_id}
    assert all(one.end_time == next_one.start_time for one, next_one in zip(stages, stages[1:], strict=False))
    assert (stages[0].start_time, stages[-1].end_time) == (whole.start_time, whole.end_time)
    assert all(span.start_time <= span.end_time and span.status.is_unset for span in (*stages, whole))
    facts = dict(whole.attributes)
    assert facts["gen_ai.request.model"] == "lora" and facts["gen_ai.response.finish_reasons"] == ("length",)
    assert (facts["gen_ai.usage.input_tokens"], facts["gen_ai.usage.output_tokens"]) == (piece.num_input_tokens, 9)
    assert facts["sun.request_id"] == "mine-1" and facts["sun.workers"] == ("decode_0",)
    assert not any(TEXT in str(value) for value in facts.values())


@pytest.mark.parametrize("header", ["", "00-nonsense", f"00-{'0' * 32}-{PARENT}-01"])
def test_without_a_valid_parent_it_is_a_trace_of_its_own(serve, kept, header):
    exporter, told = kept
    assert serve(told=told).ask(TEXT, more={"trace": {"traceparent": header}}).whole
    assert of(exporter, 5)[-1].parent is None


def test_a_client_that_does_not_sample_gets_no_span(serve, kept):
    exporter, told = kept
    service = serve(told=told)
    assert service.ask(TEXT, more={"trace": {"traceparent": f"00-{TRACE}-{PARENT}-00"}}).whole
    assert service.ask(TEXT).whole
    assert all(f"{span.context.trace_id:032x}" != TRACE for span in of(exporter, 5))


def test_the_stage_that_a_request_failed_in_is_marked(serve, kept):
    exporter, told = kept
    service = serve(told=told)

    def broken(*args):
        raise ConnectionError("gone")

    service.fleet.prefill = broken
    assert service.ask(TEXT).error.code == "INTERNAL"
    assert service.ask(TEXT, "poetry").error.code == "NOT_FOUND"
    queue, prefill, whole, refused = of(exporter, 4)
    assert queue.status.is_unset and not prefill.status.is_ok and not prefill.status.is_unset and prefill.end_time == whole.end_time
    assert whole.attributes["error.type"] == "INTERNAL" and refused.attributes["error.type"] == "NOT_FOUND" and refused.name == "chat"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """An OTLP receiver on loopback: its address, and what was posted to it."""
    posted: list[tuple[str, bytes]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802 - http.server's name
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append((self.path, gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Keep quiet."""

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", posted
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("way", ["setting", "environment"])
def test_spans_are_exported_over_otlp(serve, collector, monkeypatch, way):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    url, posted = collector
    if way == "environment":
        monkeypatch.setenv(ENDPOINTS[1], url)
    reports = Reports([otlp_spans(url if way == "setting" else "")], Kept())
    assert serve(told=reports.note).ask(TEXT, "lora", more=TRACEPARENT).whole
    within(reports.close)
    assert [path for path, _ in posted] == [PATH]
    (resource,) = ExportTraceServiceRequest.FromString(posted[0][1]).resource_spans
    spans = {span.name: span for span in resource.scope_spans[0].spans}
    assert sorted(spans) == sorted([*STAGES, "chat lora"]) and spans["chat lora"].parent_span_id.hex() == PARENT
    assert any(each.key == "service.name" and each.value.string_value == "sun" for each in resource.resource.attributes)


def test_a_collector_that_is_not_there_costs_nothing_but_its_spans(serve, monkeypatch):
    monkeypatch.setattr("sun.router.spans.CLOSE_S", 0.1)
    reports = Reports([otlp_spans("http://127.0.0.1:9")], Kept())
    assert serve(told=reports.note).ask(TEXT).whole
    within(reports.close)


def test_without_an_endpoint_there_are_none(monkeypatch):
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert otlp_spans() is None
