"""Who is next: requests wait here, in priority classes, and within a class tasks share by weight what is served."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from sun.router.errors import Busy

T = TypeVar("T")
PRIORITIES = ("high", "normal", "low")


@dataclass(frozen=True)
class Bounds:
    """Tokens (prompt and max_tokens) that may wait in all and of one task; each task's weight, 1 if it is not named."""

    tokens: int = 1 << 18
    task_tokens: int = 1 << 17
    weights: dict[str, float] | None = None


class FairQueue(Generic[T]):
    """Virtual token counters (VTC, arXiv 2401.00588): the next request is of the task that got the least for its weight.

    A task that comes back after a pause is lifted to the least of those that wait, or to the one that was served last if none does, so
    nobody saves up. Service is charged when a request leaves the queue, with its whole cost; `refund` gives back what it did not use.
    Not for several threads at once.
    wait_s(tokens): how long serving so many takes.
    """

    def __init__(self, bounds: Bounds = Bounds(), wait_s: Callable[[float], float] = lambda tokens: 0.0):
        self.bounds, self._wait_s = bounds, wait_s
        self._lines: dict[str, dict[str, deque[tuple[int, T]]]] = {priority: {} for priority in PRIORITIES}
        self._served: dict[str, float] = defaultdict(float)
        self._waiting: dict[str, int] = defaultdict(int)
        self._last = ""

    def __len__(self) -> int:
        return sum(len(line) for lines in self._lines.values() for line in lines.values())

    @property
    def tokens(self) -> int:
        """Tokens that wait."""
        return sum(self._waiting.values())

    def put(self, task: str, cost: int, item: T, priority: str = "normal") -> None:
        """Let an item wait. Raises Busy naming the bound that it would break."""
        for name, waiting, bound in (("max_queued_tokens", self.tokens, self.bounds.tokens),
                                     ("max_task_queued_tokens", self._waiting.get(task, 0), self.bounds.task_tokens)):
            if waiting and waiting + cost > bound:  # one that is alone may be as large as it likes: its own limits were checked
                raise Busy(f"{name}: {waiting} tokens wait{'' if name == 'max_queued_tokens' else f' of task {task!r}'}, "
                           f"{cost} more are over the limit of {bound}", self._wait_s(waiting + cost - bound))
        if not self._waiting.get(task):
            others = [self._served[name] for name, waiting in self._waiting.items() if waiting]
            self._served[task] = max(self._served[task], min(others, default=self._served.get(self._last, 0.0)))
        self._waiting[task] += cost
        self._lines[priority].setdefault(task, deque()).append((cost, item))

    def put_back(self, task: str, cost: int, item: T, priority: str = "normal") -> None:
        """What `pop` gave did not run: it is the first of its task's line again, whatever the bounds, and its cost is given back."""
        self._charge(task, -cost)
        self._waiting[task] += cost
        self._lines[priority].setdefault(task, deque()).appendleft((cost, item))

    def pop(self, room: int | None = None, barred: frozenset[str] = frozenset()) -> tuple[str, int, T] | None:
        """The next task, cost and item; None if nobody waits, or the next one needs more than ``room`` tokens: it is not overtaken,
        so that a long one cannot starve. Tasks in ``barred`` are passed over.
        """
        for lines in self._lines.values():
            tasks = [task for task in lines if task not in barred]
            if not tasks:
                continue
            task = min(tasks, key=lambda name: (self._served[name], name))
            cost, item = lines[task][0]
            if room is not None and cost > room:
                return None
            lines[task].popleft()
            if not lines[task]:
                del lines[task]
            self._waiting[task] -= cost
            self._charge(task, cost)
            self._last = task
            return task, cost, item
        return None

    def refund(self, task: str, tokens: int) -> None:
        """A request of the task ended and had not used so many of its tokens."""
        self._charge(task, -tokens)

    def remove(self, item: T) -> bool:
        """Take an item out of the line, as it is cancelled; False if it does not wait."""
        for lines in self._lines.values():
            for task, line in lines.items():
                for entry in line:
                    if entry[1] is item:
                        line.remove(entry)
                        self._waiting[task] -= entry[0]
                        if not line:
                            del lines[task]
                        return True
        return False

    def _charge(self, task: str, tokens: int) -> None:
        self._served[task] += tokens / (self.bounds.weights or {}).get(task, 1.0)


def parse_weights(text: str) -> dict[str, float]:
    """Read "banking=2 bash=0.5": task -> weight. Raises ValueError beginning with "weights:"."""
    weights: dict[str, float] = {}
    for entry in text.split():
        task, _, number = entry.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not task or not 0 < weight < float("inf"):
            raise ValueError(f"weights: got {entry!r}, expected task=weight with a weight over 0")
        if task in weights:
            raise ValueError(f"weights: task {task!r} is named twice")
        weights[task] = weight
    return weights
