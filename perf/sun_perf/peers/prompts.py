"""What the peers' bench asks: mixed tasks, every prompt unlike all others, so that no cache of whole prompts answers for an engine."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

TASKS = ("banking", "bash", "math", "chat")
"""The three shipped adapters, and the base as it is."""
TEMPLATES = {
    "banking": (
        "I ordered card number {n} a week ago, when will it arrive?",
        "Why was I charged {n} pounds for taking cash out of an ATM?",
        "My transfer of {n} euros to Japan has the wrong exchange rate, can you check it?",
        "A payment of {n} dollars is still pending since this morning, why?",
    ),
    "bash": (
        "find all files bigger than {n} MB under /var",
        "count the lines of all Python files newer than {n} days in the current directory",
        "show the {n} largest directories below /home",
        "delete empty directories in /tmp that are older than {n} hours",
    ),
    "math": (
        "A baker made {n} muffins and sold 3 boxes of 6. How many are left?",
        "Lena has 5 bags with {n} marbles each. How many marbles does she have in all?",
        "Tom had {n} dollars. He bought 2 books for 12 dollars each. How much money does he have now?",
        "{n} children are split evenly into 6 teams. How many children are in each team?",
    ),
    "chat": (
        "Tell me {n} things that I should know before I visit Lisbon.",
        "Explain to a child of {n} months or years why the sky is blue.",
        "Write a short poem about the number {n}.",
        "What would be a good plan for the next {n} days if I want to learn to swim?",
    ),
}


@dataclass(frozen=True)
class Ask:
    """One request: a user message for a task's model."""

    task: str
    text: str


class Prompts:
    """Hands out asks, the tasks taking turns; no text comes twice from the same object."""

    def __init__(self) -> None:
        self._numbers = count(24)

    def take(self, asks: int) -> list[Ask]:
        """The next ``asks`` requests."""
        taken = []
        for i in range(asks):
            task, turn = TASKS[i % len(TASKS)], i // len(TASKS)
            taken.append(Ask(task, TEMPLATES[task][turn % len(TEMPLATES[task])].format(n=next(self._numbers))))
        return taken
