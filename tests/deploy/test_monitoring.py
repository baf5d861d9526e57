"""Prometheus and Grafana can read the dashboard's and the alert rules' PromQL, and it asks for metrics and labels that the code exports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from sun.router.meter import METRICS, WORKER_METRICS

from .conftest import INSTALL

FOLDER = Path(__file__).parents[2] / "client" / "monitoring"
SCRAPED = {"instance", "job"}
"""Labels that Prometheus gives all that it scrapes."""
EXPORTED = {
    "up": SCRAPED,
    **{f"{name}{part}": {*metric.labels, *more} | SCRAPED for name, metric in (METRICS | WORKER_METRICS).items()
       for part, more in ({"_bucket": ["le"], "_sum": [], "_count": []} if metric.buckets else {"": []}).items()}}
"""The labels of each series that there is."""


def panels() -> list[dict]:
    """The dashboard's."""
    return json.loads((FOLDER / "grafana.json").read_text())["panels"]


def queries() -> list[tuple[str, str]]:
    """All PromQL of both files, each with the text that is shown of its result."""
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return [(target["expr"], target["legendFormat"]) for panel in panels() for target in panel["targets"]] + [
        (rule["expr"], json.dumps(rule["annotations"])) for group in rules for rule in group["rules"]]


def labels(query: str) -> set[str]:
    """The labels of a query's result. Raises ValueError for what is no PromQL, and for what nobody exports."""
    promql = pytest.importorskip("promql_parser", reason=f"promql_parser is {INSTALL}")

    def of(node) -> set[str] | None:
        match node:
            case promql.NumberLiteral():
                return None
            case promql.VectorSelector():
                return missing({matcher.name for matcher in node.matchers.matchers}, EXPORTED.get(node.name), node.name)
            case promql.MatrixSelector():
                return of(node.vector_selector)
            case promql.AggregateExpr():
                by = set(node.modifier.labels) if node.modifier else set()
                return by & missing(by, of(node.expr), query)
            case promql.Call(func=func, args=args):
                found = of(args[-1])
                return missing({"le"}, found, query) - {"le"} if func.name == "histogram_quantile" else found
            case promql.BinaryExpr(lhs=lhs, rhs=rhs):
                left, right = of(lhs), of(rhs)
                if right is not None and left != right:
                    raise ValueError(f"{query}: {left} on one side and {right} on the other")
                return left
        raise ValueError(f"{query}: this test does not know {type(node).__name__}")

    return of(promql.parse(query.replace("$__rate_interval", "1m")))


def missing(asked: set[str], there: set[str] | None, what: str) -> set[str]:
    """The labels that there are. Raises ValueError if one that is asked for is not among them."""
    if there is None or not asked <= there:
        raise ValueError(f"{what}: nobody exports {sorted(asked - (there or set())) or 'it'}")
    return there


@pytest.mark.parametrize("query, shown", queries())
def test_each_query_parses_and_asks_for_what_is_exported_and_shows_labels_that_it_has(query, shown):
    assert set(re.findall(r"\{\{ *(?:\$labels\.)?(\w+) *\}\}", shown)) <= labels(query)


@pytest.mark.parametrize("slip, words", [
    ("sum by (task) (rate(sun_failover_total[5m])", "unclosed"),
    ("sum by (task) (rates(sun_failover_total[5m]))", "unknown function"),
    ("rate(sun_failover_total)", "expected type"),
    ("sun_request_failed_total > 0", "sun_request_failed_total: nobody exports it"),
    ("sun_handoff_seconds > 1", "sun_handoff_seconds: nobody exports it"),
    ('sun_worker_up{name="decode_0"}', "nobody exports .'name'"),
    ("sum by (task) (sun_worker_up)", "nobody exports .'task'"),
    ("histogram_quantile(0.5, sum by (task) (rate(sun_handoff_seconds_bucket[1m])))", "nobody exports .'le'"),
    ("sum by (task) (sun_num_requests_running) / sum by (worker) (sun_worker_up)", "on one side"),
])
def test_a_slip_would_be_found(slip, words):
    with pytest.raises(ValueError, match=words):
        labels(slip)


def test_panels_do_not_overlap_and_have_names():
    cells = [(x, y) for p in panels() for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
             for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({p["title"] for p in panels()}) == len(panels()) == len({p["id"] for p in panels()})
