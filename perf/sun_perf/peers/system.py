"""What is measured: one way of serving the four tasks. Ours and each peer's are of this shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sun.model.manifest import BaseManifest
from sun.text.prompt import PromptFormat
from sun_client.root import Root
from sun_perf.peers.child import freeze, thaw
from sun_perf.peers.prompts import Ask
from sun_perf.peers.wave import Wave, stream_wave

CONTEXT = 512
"""Tokens of prompt and answer that a peer keeps room for, a request."""


@dataclass(frozen=True)
class Place:
    """Where a run works.

    root: the checkout. runs: environments, converted weights and logs. port: first of ten TCP ports. threads: CPUs that each side has.
    most: the most requests at once.
    """

    root: Root
    runs: Path
    port: int
    threads: int
    most: int

    def adapter(self, task: str) -> Path | None:
        """The task's LoRA adapter; None for the base as it is."""
        folder = self.root.shipped / task
        return folder if folder.is_dir() else None

    def prompts(self) -> PromptFormat:
        """The tokeniser and chat template that all sides' prompts go through."""
        manifest: BaseManifest = self.root.manifest()
        return PromptFormat.load(self.root.base, manifest.prompt)


class System(ABC):
    """Started inside a ``with``, gone after it; its processes run only while it is thawed.

    settings: what it was started with, for the results.
    """

    settings: dict

    def __init__(self, place: Place):
        self.place = place

    def __enter__(self) -> System:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @abstractmethod
    def start(self) -> None:
        """Start and wait until all tasks can be asked. Raises SunError with the log's end if that fails."""

    @abstractmethod
    def stop(self) -> None:
        """Stop whatever was started."""

    @abstractmethod
    def sessions(self) -> list[int]:
        """Sessions (pids of their leaders) of its processes."""

    def freeze(self) -> None:
        """Give up the CPUs until `thaw`."""
        for session in self.sessions():
            freeze(session)

    def thaw(self) -> None:
        """Go on."""
        for session in self.sessions():
            thaw(session)

    @abstractmethod
    def wave(self, asks: Sequence[Ask], tokens: int) -> Wave:
        """All asks at once, each answer of exactly ``tokens`` tokens."""


class StreamSystem(System):
    """One whose answers are streamed, so that TTFT and TPOT can be told."""

    @abstractmethod
    def stream(self, ask: Ask, tokens: int) -> Iterator[int]:
        """One answer of exactly ``tokens`` tokens: see `wave.Stream`."""

    def wave(self, asks: Sequence[Ask], tokens: int) -> Wave:
        """See `System.wave`."""
        return stream_wave(asks, self.stream, tokens)
