"""Figures as Triton's own metrics, at its /metrics."""

import logging
import queue
import threading

import triton_python_backend_utils as pb_utils

from sun.router.meter import COUNTERS, Metric

log = logging.getLogger("sun.router")


class TritonMeter:
    """A `sun.router.meter.Meter`. A thread does the calls: each goes to tritonserver and back.

    metrics: by name; see `sun.router.meter.METRICS`.
    """

    def __init__(self, metrics: dict[str, Metric]):
        self._buckets = {name: list(metric.buckets) for name, metric in metrics.items()}
        self._families = {name: pb_utils.MetricFamily(name=name, description=metric.text, kind=kind(name, metric.buckets)) for name, metric in metrics.items()}
        self._metrics: dict[tuple, object] = {}
        self._waiting: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="meter", daemon=True)
        self._thread.start()

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """See `Meter.add`."""
        self._waiting.put(("observe" if self._buckets[name] else "increment", name, value, labels))

    def set(self, name: str, value: float, **labels: str) -> None:
        """See `Meter.set`."""
        self._waiting.put(("set", name, value, labels))

    def close(self) -> None:
        """Hand over what waits and stop."""
        self._waiting.put(None)
        self._thread.join(5.0)

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            call, name, value, labels = item
            try:
                getattr(self._metric(name, labels), call)(value)
            except Exception:  # figures are not worth a request
                log.exception("could not count %s", name)

    def _metric(self, name: str, labels: dict[str, str]):
        key = (name, *labels.items())
        if key not in self._metrics:
            more = {"buckets": self._buckets[name]} if self._buckets[name] else {}
            self._metrics[key] = self._families[name].Metric(labels=labels, **more)
        return self._metrics[key]


def kind(name: str, buckets: tuple[float, ...]):
    """A metric's kind, by its name and buckets."""
    return pb_utils.MetricFamily.HISTOGRAM if buckets else pb_utils.MetricFamily.COUNTER if name.endswith(COUNTERS) else pb_utils.MetricFamily.GAUGE
