"""The dashboard and the alert rules ask for figures that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import requests
import yaml

from sun_client.metrics import read
from tests.server.conftest import GREEDY, wait_until

FOLDER = Path(__file__).parents[2] / "client" / "monitoring"
NAME = re.compile(r"sun_[a-z0-9_]+")


def expressions() -> set[str]:
    """All PromQL of both files."""
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    asked = {target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
    return asked | {rule["expr"] for group in rules["groups"] for rule in group["rules"]}


def test_every_figure_they_ask_for_is_served(server, client, http):
    client.generate("math", "What is 2 plus 2?", sampling=GREEDY)
    requests.post(f"{http}/sun/generate", json={"text_input": "hi", "task": "poetry"})
    # Counters that only a fault makes are not there before the first.
    faults = {"sun_request_failure_total", "sun_failover_total", "sun_records_lost_total"}
    asked = {name for text in expressions() for name in NAME.findall(text)} - faults
    url = f"127.0.0.1:{server.ports.metrics}"
    assert wait_until(lambda: asked <= read(url).keys()), sorted(asked - read(url).keys())


def test_panels_do_not_overlap_and_have_names():
    panels = json.loads((FOLDER / "grafana.json").read_text())["panels"]
    cells = [(x, y) for p in panels for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
             for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({p["title"] for p in panels}) == len(panels) == len({p["id"] for p in panels})
