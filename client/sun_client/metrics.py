"""A running server's metrics, read from its Prometheus endpoint."""

from __future__ import annotations

import http.client
import re

from prometheus_client.parser import text_string_to_metric_families

from sun_client.direct import urlopen
from sun_client.errors import SunError

Metrics = dict[str, dict[tuple[tuple[str, str], ...], float]]
"""A sample's name ("..._total", "..._sum", "..._count") -> its labels, sorted -> its value."""
PART = re.compile(r"(_bucket|_sum|_count)_total$")
"""The parser ends every counter's name in "_total"; these are parts of a histogram that comes as counters (`sun.router.gaps`)."""


def read(url: str, timeout: float = 10.0) -> Metrics:
    """The metrics of ours at ``url`` (host:port). Raises SunError."""
    try:
        with urlopen(f"http://{url}/metrics", timeout=timeout) as response:
            text = response.read().decode()
    except OSError as error:
        raise SunError(f"no metrics at {url}: {error}", "UNAVAILABLE") from error
    except (http.client.HTTPException, UnicodeDecodeError) as error:  # gRPC's port, say
        raise SunError(f"no metrics at {url}: what answers there is no HTTP server", "UNAVAILABLE") from error
    return parse(text)


def parse(text: str) -> Metrics:
    """The metrics of ours in Prometheus' text format."""
    found: Metrics = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("sun_"):
                found.setdefault(PART.sub(r"\1", sample.name), {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def total(metrics: Metrics, name: str, **labels: str) -> float:
    """The sum of a name's samples that have at least these labels; 0 if there are none."""
    return sum(value for found, value in metrics.get(name, {}).items() if labels.items() <= dict(found).items())


def label_values(metrics: Metrics, label: str) -> list[str]:
    """All values of a label, sorted."""
    return sorted({value for samples in metrics.values() for found in samples for key, value in found if key == label})
