"""One task's flood does not make another wait behind it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

FLOOD, OTHERS = 48, 3
PROMPT = "hello " * 50
"""Long enough that the flood waits for its prefill module, not for a decode worker."""


def test_another_tasks_requests_are_begun_far_before_a_floods_backlog(client, idle):
    order, first = [], threading.Event()

    def ask(task: str, text: str) -> None:
        client.generate(task, text, sampling={"max_tokens": 1, "temperature": 0})
        order.append(task)
        first.set()

    with ThreadPoolExecutor(FLOOD + OTHERS) as pool:
        flood = [pool.submit(ask, "bash", f"{i} {PROMPT}") for i in range(FLOOD)]
        assert first.wait(60)
        others = [pool.submit(ask, "math", f"What is {i} plus 2?") for i in range(OTHERS)]
        for asked in (*flood, *others):
            asked.result()
    last = len(order) - 1 - order[::-1].index("math")
    assert order[last:].count("bash") >= FLOOD // 3, order
    assert idle()
