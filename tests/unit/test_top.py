"""`sun top` can be read in a terminal of 80 columns."""

from __future__ import annotations

from rich.console import Console

from sun_client.metrics import parse
from sun_client.top import tables

TASKS, WORKERS = ("banking", "customer-support-de"), ("decode_0", "decode_15")
HEADERS = "worker up tokens to come KV used steps ms/step sequences /step tasks task running waiting ended failed in out queue TTFT TPOT ms"


def test_no_name_and_no_number_is_cut_in_80_columns():
    metrics = {
        "sun_worker_up": {(("worker", worker),): 1.0 for worker in WORKERS},
        "sun_worker_outstanding_tokens": {(("worker", worker),): 16384.0 for worker in WORKERS},
        "sun_num_requests_running": {(("task", task),): 192.0 for task in TASKS},
        "sun_request_prompt_tokens_sum": {(("task", task),): 123456.0 for task in TASKS},
    }
    console = Console(width=80, highlight=False)
    with console.capture() as shown:
        console.print(tables(metrics, {}, None))
    text = shown.get()
    assert "\u2026" not in text and max(map(len, text.splitlines())) <= 80
    assert {*HEADERS.split(), *WORKERS, "banking", "16384", "192", "123456"} <= set(text.split())
    assert "".join(line.split()[0] for line in text.splitlines() if line.startswith(("customer", "-", "sup", "port"))) == TASKS[1]


def test_a_histogram_that_comes_as_counters_has_the_names_of_one():
    text = "".join(f"# TYPE sun_gap_{part} counter\nsun_gap_{part}{{{labels}}} 3\n" for part, labels in
                   (("bucket", 'le="0.5",task="math"'), ("sum", 'task="math"'), ("count", 'task="math"')))
    text += "# TYPE sun_failover_total counter\nsun_failover_total 1\nother_total 1\n"
    assert parse(text) == {
        "sun_gap_bucket": {(("le", "0.5"), ("task", "math")): 3}, "sun_gap_sum": {(("task", "math"),): 3},
        "sun_gap_count": {(("task", "math"),): 3}, "sun_failover_total": {(): 1}}
