"""Each request as OpenTelemetry spans, by the semantic conventions for generative AI: itself, and in it queue, prefill, handoff and decode.

The spans are made when the request has ended, from the moments in its record, so that serving does nothing for them. Triton's own
tracing is not used: with calls from several threads it crashes the server (24.10).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from sun.router.record import Record
from sun.router.reports import CLOSE_S

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanProcessor

log = logging.getLogger("sun.router")
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""The standard's environment variables; either turns the spans on. The exporter reads the others of the standard, too."""
PATH = "/v1/traces"


class Spans:
    """A `sun.router.reports.Sink`. processor: what takes the finished spans."""

    name = "spans"

    def __init__(self, processor: SpanProcessor):
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # Not the process's global one, and no exit handler: whoever made this closes it.
        self._provider = TracerProvider(resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "sun")}), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("sun.router")
        self._propagator = TraceContextTextMapPropagator()

    def write(self, record: Record) -> None:
        """Make a request's spans, as children of the client's `traceparent` if it gave a valid one."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        whole = self._tracer.start_span(
            f"chat {record.task}".rstrip(), context=self._propagator.extract(record.trace), kind=SpanKind.SERVER,
            attributes=attributes(record), start_time=_unix_ns(record, record.arrived))
        inside, failed = set_span_in_context(whole), Status(StatusCode.ERROR)
        for name, begin, end in stages(record):
            part = self._tracer.start_span(name, context=inside, start_time=_unix_ns(record, begin))
            if end is None and record.error is not None:
                part.set_status(failed)
            part.end(_unix_ns(record, record.ended if end is None else end))
        if record.error is not None:
            whole.set_status(failed)
        whole.end(_unix_ns(record, record.ended))

    def close(self) -> None:
        """Export what is left. A collector that does not answer is waited for no longer than `CLOSE_S`."""
        closing = threading.Thread(target=self._provider.shutdown, name="spans", daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def otlp_spans(endpoint: str = "") -> Spans | None:
    """Spans that go to an OTLP collector over HTTP: to ``endpoint`` (http://host:4318), else where the environment says.

    None where neither names one, and, with a warning, where the package is not installed.
    """
    if not endpoint and not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    if importlib.util.find_spec("opentelemetry") is None or importlib.util.find_spec("opentelemetry.sdk") is None:
        log.warning("no spans are exported: run `pip install sun-triton[otel]` in the environment that tritonserver uses")
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return Spans(BatchSpanProcessor(OTLPSpanExporter(endpoint.rstrip("/") + PATH if endpoint else None)))


def stages(record: Record) -> list[tuple[str, float, float | None]]:
    """A request's stages, each with its begin and end; the end is None if the request ended in it."""
    if not record.task:  # refused before it could wait
        return []
    found: list[tuple[str, float, float | None]] = [("queue", record.arrived, record.began)]
    if record.began is None:
        return found
    if not record.handed_over:
        found.append(("prefill", record.began, record.prefilled))
    if record.shipped is None:
        return found
    found.append(("handoff", record.shipped, record.placed))
    if record.placed is not None:
        found.append(("decode", record.placed, None))
    return found


def attributes(record: Record) -> dict[str, Any]:
    """What the request's own span tells; names of OpenTelemetry's conventions, and of ours where they have none."""
    facts = {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "sun", "gen_ai.request.model": record.task or record.asked, "gen_ai.response.id": record.id,
        "gen_ai.usage.input_tokens": record.prompt, "gen_ai.usage.output_tokens": record.tokens,
        "gen_ai.response.finish_reasons": None if record.error else [record.outcome], "error.type": record.outcome if record.error else None,
        "gen_ai.response.time_to_first_chunk": record.ttft_s, "sun.request_id": record.request_id, "sun.key": record.key,
        "sun.time_per_output_token": record.tpot_s, "sun.workers": record.workers, "sun.moves": record.moves,
    }
    return {name: value for name, value in facts.items() if value not in (None, "", [])}


def _unix_ns(record: Record, moment: float) -> int:
    """A moment of the monotonic clock as nanoseconds of Unix time; nothing of a request is later than its end."""
    return record.arrived_ns + int((min(moment, record.ended) - record.arrived) * 1e9)
