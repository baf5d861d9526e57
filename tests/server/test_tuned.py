"""From data to serving: a task tuned through a quantised decode module answers from tritonserver as `sun eval` says it does."""

from __future__ import annotations

import json
from pathlib import Path

import requests

from sun.text.prompt import PromptSettings
from sun_build.base import build_base
from sun_client.server import Server
from tests.server.conftest import free_ports, make_root, sun
from tests.unit import tiny

SCHEME = 'parameters { key: "scheme" value { string_value: "int4" } }\n'


def tiny_root(root: Path) -> Path:
    """A repository root with a random base of two layers, and int4 decode workers."""
    base = root.with_name("base")
    build_base(str(tiny.checkpoint(root.with_name("source"))), base, PromptSettings())
    make_root(root, base)
    for worker in ("decode_0", "decode_1"):
        with (root / "model_repository" / worker / "config.pbtxt").open("a") as config:
            config.write(SCHEME)
    return root


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_served_answers_of_tuned_tasks_are_those_of_sun_eval(tmp_path):
    root, data = tiny_root(tmp_path / "root"), tmp_path / "data.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": "yes" if len(word) < 5 else "no"}]}
            for word in ("a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg", "hhhhhhhh")]
    data.write_text("\n".join(map(json.dumps, rows)))
    scores = {}
    for task, more in (("yes", []), ("whole", ["--whole-prompt"])):
        # Few steps, so that not all answers are right yet and agreement says something.
        sun("tune", "--data", str(data), "--out", str(tmp_path / task), "--root", str(root), "--steps", "25", "--batch", "8", "--rank", "4", "--lr", "0.02",
            "--decode", "int4", "--metric", "exact", *more)
        sun("task", "add", task, "--weights", str(tmp_path / task), "--root", str(root))
        line = sun("eval", "--task", task, "--data", str(data), "--root", str(root), "--against", "qsun", "--out", str(tmp_path / f"{task}.local"))
        scores[task] = line.split("exact")[1]
    with Server(root, free_ports()) as server:
        for task, known in scores.items():
            served = tmp_path / f"{task}.served"
            told = sun("eval", "--task", task, "--data", str(data), "--root", str(root), "--server", "--url", f"127.0.0.1:{server.ports.grpc}", "--out", str(served))
            answers = read(served)
            assert answers == read(tmp_path / f"{task}.local") and told.split("exact")[1] == known
            assert len({row["answer"] for row in answers}) > 1
            # The ensemble hands the prompt over step by step.
            got = requests.post(f"http://127.0.0.1:{server.ports.http}/v2/models/{task}/generate", json={"text_input": "say a"}, timeout=60).json()
            assert got["text_output"] == answers[0]["answer"]
