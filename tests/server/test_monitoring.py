"""The dashboard and the alert rules ask for figures that a server gives."""

from __future__ import annotations

import re

import requests

from sun_client.metrics import read
from tests.deploy.test_monitoring import queries
from tests.server.conftest import GREEDY, wait_until

NAME = re.compile(r"sun_[a-z0-9_]+")


def test_every_figure_they_ask_for_is_served(server, client, http):
    client.generate("math", "What is 2 plus 2?", sampling=GREEDY)
    requests.post(f"{http}/sun/generate", json={"text_input": "hi", "task": "poetry"})
    # Counters that only a fault makes are not there before the first.
    faults = {"sun_request_failure_total", "sun_failover_total", "sun_records_lost_total"}
    asked = {name for query, _ in queries() for name in NAME.findall(query)} - faults
    url = f"127.0.0.1:{server.ports.metrics}"
    assert wait_until(lambda: asked <= read(url).keys()), sorted(asked - read(url).keys())
