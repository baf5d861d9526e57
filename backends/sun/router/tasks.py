"""The tasks there are: the folders `prefill_<task>` of the model repository, read when asked for, so that new ones need no restart."""

from __future__ import annotations

import re
import time
from pathlib import Path

from sun.model.manifest import TASK_FILE, TaskManifest
from sun.router.errors import RequestError

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
SWAP_S = 0.5
"""A task is gone when its folder has been for so long: `sun task add` replaces it by moving one away and another in."""
LOOK_S = 0.01


class TaskRegistry:
    """Manifests of the tasks in a model repository, cached by their files' modification times."""

    def __init__(self, repository: Path):
        self.repository = repository
        self._cache: dict[str, tuple[int, TaskManifest]] = {}

    def names(self) -> list[str]:
        """All tasks, sorted."""
        return sorted(path.parent.parent.name.removeprefix("prefill_") for path in self.repository.glob(f"prefill_*/1/{TASK_FILE}"))

    def get(self, name: str | None) -> TaskManifest:
        """A task's manifest. Raises RequestError (INVALID_ARG or NOT_FOUND) that names the tasks there are."""
        if name is None:
            raise RequestError("INVALID_ARG", f"task: is missing; the tasks here are {', '.join(self.names())}")
        end = time.monotonic() + SWAP_S
        while True:
            try:
                return self._load(name)
            except FileNotFoundError:
                if name not in self._cache or time.monotonic() > end:
                    break
            time.sleep(LOOK_S)
        self._cache.pop(name, None)
        raise RequestError("NOT_FOUND", f"task: {name[:64]!r} is not known; the tasks here are {', '.join(self.names())}")

    def _load(self, name: str) -> TaskManifest:
        if NAME.fullmatch(name) is None:
            raise FileNotFoundError(name)
        path = self.repository / f"prefill_{name}" / "1" / TASK_FILE
        stamp = path.stat().st_mtime_ns
        known = self._cache.get(name)
        if known is None or known[0] != stamp:
            known = self._cache[name] = (stamp, TaskManifest.load(path.parent))
        return known[1]
