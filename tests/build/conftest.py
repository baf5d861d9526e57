"""A tiny base in a repository root of its own, and data to tune it on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sun.text.prompt import PromptFormat, PromptSettings
from sun_build.base import build_base
from sun_build.tune.data import Example, examples, read_conversations
from tests.unit import tiny


@pytest.fixture(scope="package")
def base_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_base(str(tiny.checkpoint(folder / "source")), folder / "build" / "base", PromptSettings())
    return folder / "build" / "base"


@pytest.fixture
def root(base_dir, tmp_path) -> Path:
    """A repository root with the tiny base and an empty model repository."""
    (tmp_path / "root" / "model_repository").mkdir(parents=True)
    (tmp_path / "root" / "build").mkdir()
    (tmp_path / "root" / "build" / "base").symlink_to(base_dir)
    return tmp_path / "root"


@pytest.fixture
def data(tmp_path) -> Path:
    """Four conversations whose answer is always yes."""
    rows = [{"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": "yes"}]} for word in ("a", "bb", "ccc", "dddd")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data.jsonl"


@pytest.fixture
def rows(base_dir, data) -> list[Example]:
    """Those conversations as a run learns them."""
    return examples(read_conversations(data), PromptFormat.load(base_dir, PromptSettings()), 300, 500)[0]
