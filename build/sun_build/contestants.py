"""What a task's score is held against: which weights fill the prompt's KV and which decode from it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sun.model.loading import task_files
from sun.model.manifest import BaseManifest, write_manifest
from sun.model.quantise import FULL
from sun_build.tasks import manifest_of, weights_kind

ROWS = ("base", "full", "naive", "sun", "qsun")


@dataclass(frozen=True)
class Contestant:
    """prefill: a folder of weights, None for the base's. own: a checkpoint to decode with, None for the shared module as ``scheme`` has it."""

    name: str
    prefill: Path | None
    own: Path | None = None
    scheme: str = FULL


def contestant(name: str, tuned: Path, full: Path | None, scheme: str) -> Contestant:
    """One of `ROWS`. tuned: the task's prefill module. full: an ordinarily fine-tuned checkpoint. scheme: of qsun's decode module.

    base is the base model untouched; full is conventional serving, each task with a decode module of its own; naive puts
    that model's weights into the prefill as they are and decodes with the base. Raises ValueError for one that is not
    known, or without the weights that it needs.
    """
    match name:
        case "base":
            return Contestant(name, None)
        case "sun":
            return Contestant(name, tuned)
        case "qsun":
            return Contestant(name, tuned, scheme=scheme)
        case "full" | "naive":
            if full is None:
                raise ValueError(f"against: {name} needs an ordinarily fine-tuned checkpoint (sun tune --method full)")
            return Contestant(name, full, own=full if name == "full" else None)
    raise ValueError(f"against: got {name!r}, expected some of {', '.join(ROWS)}")


@contextmanager
def staged(base_dir: Path, task: str, prefill: Path | None) -> Iterator[Path]:
    """A model repository, for as long as it is needed, in which ``task`` has these weights; links, no copies."""
    kind, source = weights_kind(prefill), prefill or base_dir
    with tempfile.TemporaryDirectory(prefix="sun-eval-") as scratch:
        folder = Path(scratch) / f"prefill_{task}" / "1"
        folder.mkdir(parents=True)
        for file in task_files(source, kind):
            (folder / file.name).symlink_to(file.resolve())
        write_manifest(folder, manifest_of(BaseManifest.load(base_dir), source, kind, task))
        yield Path(scratch)
