"""What the command line shows a person while it works."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sun_client.control import Control
from sun_client.server import Server

console = Console(highlight=False)


def say(text: str, style: str | None = None) -> None:
    """Print a line, taken as it is; a line stays a line also where it goes into a file."""
    console.print(text, style=style, markup=False, soft_wrap=True)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner with the time that it has taken so far; where there is no terminal, one line."""
    if not console.is_terminal:
        say(f"{what} ...")
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar of ``total``; gives report(done, total), which moves it. Nothing where there is no terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=total)
        yield lambda done, total: progress.update(bar, completed=done)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, transformers and tqdm draw no bars of their own into ours, and warn no user of what their next versions will change.

    To be entered before they are imported.
    """
    names = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    # peft imports it, and it would have each user install a package that fetches kernels from the hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def start(server: Server) -> None:
    """Start a server, showing that it loads."""
    with working(f"starting tritonserver (log: {server.log})"):
        server.start()


def load(root: Path, task: str, *models: str) -> None:
    """Have the servers of a root that run now load a task's models, showing it. Raises ServerError."""
    for control in Control.running(root):
        with working(f"loading task {task}"):
            control.load(*models)
        print(f"The server on port {control.http_port} serves it now.")


def stop(server: Server) -> None:
    """Stop a server, showing that it drains; clears up after one that has ended by itself."""
    if not server.running:
        server.stop()
        return
    with working("stopping tritonserver (open streams may end first; Ctrl-C ends them now)"):
        server.stop()
