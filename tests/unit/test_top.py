"""`sun top` can be read in a terminal of 80 columns."""

from __future__ import annotations

from rich.console import Console

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
