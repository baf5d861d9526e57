"""Many questions to a running server at once, their answers in order."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from sun_client.client import SunClient

if TYPE_CHECKING:
    from sun_build.tune.data import Conversation


def server_answers(url: str, task: str, conversations: list[Conversation], max_tokens: int, at_once: int,
                   report: Callable[[int, int], None]) -> list[str]:
    """Greedy answers to the last assistant turn of every conversation; ``at_once`` requests in flight. Raises SunError."""
    with SunClient(url) as client, ThreadPoolExecutor(at_once) as pool:
        def ask(conversation: Conversation) -> str:
            messages = conversation.messages[: conversation.last_turn]
            return client.generate(task, messages=messages, sampling={"temperature": 0, "max_tokens": max_tokens}).text

        answers = []
        for answer in pool.map(ask, conversations):
            answers.append(answer)
            report(len(answers), len(conversations))
        return answers
