"""Fixtures: one tiny base per kind and one repository of tasks per session; services and benches that are closed after each test."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from sun.handoff.shm import Shm
from sun.local import LocalFleet
from sun.model.manifest import BaseManifest
from sun.router.keys import Keys
from sun.router.meter import Meter, NoMeter
from sun.router.policy import LeastTokens
from sun.router.record import Record
from sun.router.router import Limits, Router
from sun.router.tasks import TaskRegistry
from sun.stubs import TICK_S
from sun.text.prompt import PromptFormat, PromptSettings
from sun_build.base import build_base

from . import tiny
from .harness import Bench, Service

WAIT = "import time\ntime.sleep(600)\n"


@pytest.fixture
def shm(tmp_path) -> Iterator[Shm]:
    """A transport whose files tell what is left behind."""
    shm = Shm(tmp_path / "kv", publisher=True)
    yield shm
    shm.close()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind (see `tiny.KINDS`) -> a base of it in our layout, made by the project's build from a local checkpoint."""

    @cache
    def base(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        build_base(str(tiny.checkpoint(folder / "source", kind)), folder / "base", PromptSettings())
        return folder / "base"

    return base


@pytest.fixture(scope="session")
def base_dir(bases) -> Path:
    """The base of most tests."""
    return bases("llama")


@pytest.fixture(scope="session")
def base(base_dir) -> BaseManifest:
    """Its manifest."""
    return BaseManifest.load(base_dir)


@pytest.fixture(scope="session")
def adapter_dir(base_dir, tmp_path_factory) -> Path:
    """A LoRA adapter for it, as peft saved it."""
    return tiny.adapter(tmp_path_factory.mktemp("adapter"), base_dir)


@pytest.fixture(scope="session")
def full_dir(tmp_path_factory) -> Path:
    """A checkpoint of the same geometry with weights of its own."""
    return tiny.checkpoint(tmp_path_factory.mktemp("full"), seed=7)


@pytest.fixture(scope="session")
def repository(base_dir, adapter_dir, full_dir, tmp_path_factory) -> Path:
    """A model repository: tasks ``plain`` (the base's own weights), ``lora``, ``full``, and ``terse`` (with defaults of its own)."""
    repository = tmp_path_factory.mktemp("repository")
    tiny.task(repository, base_dir, "plain")
    tiny.task(repository, base_dir, "lora", "lora", adapter_dir)
    tiny.task(repository, base_dir, "full", "full", full_dir)
    tiny.task(repository, base_dir, "terse", sampling={"max_tokens": 3, "temperature": 0, "ignore_eos": True})
    return repository


@pytest.fixture(scope="session")
def prompts(base_dir) -> PromptFormat:
    """Its tokeniser and chat template."""
    return PromptFormat.load(base_dir, PromptSettings())


@pytest.fixture
def bench(base_dir, repository) -> Iterator[Callable[..., Bench]]:
    """Makes benches (see `Bench`)."""
    made = []

    def make(base: Path = base_dir, task: Path = repository / "prefill_plain" / "1", **settings) -> Bench:
        made.append(Bench(base, task, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def serve(base_dir, repository, prompts, monkeypatch) -> Iterator[Callable[..., Service]]:
    """Makes services. fleet: the class; transport: also the router's; all else goes to the fleet."""
    monkeypatch.setattr("sun.router.router.POLL_S", 0.02)
    monkeypatch.setattr("sun.router.pool.BEAT_S", 0.02)
    made = []

    def make(base: Path = base_dir, repository: Path = repository, policy=None, limits: Limits = Limits(max_tokens=tiny.CONTEXT),
             fleet: type[LocalFleet] = LocalFleet, transport=None, kv_tokens: int = 4096, meter: Meter = NoMeter(), keys: Keys | None = None,
             told: Callable[[Record], None] = lambda record: None, **settings) -> Service:
        registry = TaskRegistry(repository)
        folders = {name: repository / f"prefill_{name}" / "1" for name in registry.names()}
        local = fleet(base, folders, transport=transport, kv_tokens=kv_tokens, **settings)
        router = Router(local, list(local.decodes), registry, prompts, policy or LeastTokens(), [transport] if transport else [], limits, meter,
                        keys, told)
        made.append(Service(local, router))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def start_stub(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """A function: starts a process that looks like a model's stub, a child of this one."""
    started = []

    def start(model: str, name: str = "model.py", instance: str = "_0_0") -> subprocess.Popen:
        file = tmp_path / "a repository" / model / "1" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(WAIT)
        started.append(subprocess.Popen([sys.executable, str(file), "region", "1", "1", "1", "backends", "1", model + instance]))
        while not Path(f"/proc/{started[-1].pid}/cmdline").read_bytes().endswith(f"{model}{instance}\0".encode()):
            time.sleep(0.01)
        time.sleep(2 * TICK_S)  # until it has surely started before now
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
