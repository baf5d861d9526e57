"""BFCL's simple and multiple questions (Python) as training and test conversations that share no function."""

from __future__ import annotations

import importlib.util
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

CATEGORIES = ("simple_python", "multiple")
TYPES = {"string": "str", "integer": "int", "boolean": "bool", "array": "list"}


def installed() -> Path:
    """The data folder of the installed `bfcl-eval` wheel; FileNotFoundError says how to get it."""
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("BFCL is not installed: pip install --no-deps bfcl-eval==2026.3.23")
    return Path(spec.submodule_search_locations[0]) / "data"


def signature(function: dict) -> str:
    """A function's description on one line: ``name(parameter: type, optional: type = default): what it does``."""
    details = function["parameters"]
    parts = []
    for name, detail in details["properties"].items():
        kind = detail["type"]
        if kind in ("array", "tuple") and "items" in detail:
            kind = f"list[{TYPES.get(detail['items']['type'], detail['items']['type'])}]"
        part = f"{name}: {TYPES.get(kind, kind)}"
        if "enum" in detail:
            part += f" in {json.dumps(detail['enum'])}"
        parts.append(part if name in details.get("required", []) else f"{part} = {detail.get('default')}")
    return f"{function['name']}({', '.join(parts)}): {function['description'].split('. ')[0].rstrip('.')}"


def call(possible: dict[str, dict[str, list]], functions: list[dict]) -> str:
    """The call that a possible answer describes, with the first acceptable values; what may be left out is."""
    (name, parameters), = possible.items()
    required = next(f for f in functions if f["name"] == name)["parameters"].get("required", [])
    given = [f"{key}={_value(values)!r}" for key, values in parameters.items() if "" not in values or key in required]
    return f"{name}({', '.join(given)})"


def _value(acceptable: list) -> Any:
    """The first of some acceptable values; in a dictionary each key has acceptable values of its own."""
    return _plain(next(value for value in acceptable if value != ""))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _value(answers) for key, answers in value.items() if "" not in answers}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def conversations(data: Path) -> list[dict]:
    """Rows {"messages", "functions", "possible"} of all questions, in BFCL's order."""
    rows = []
    for category in CATEGORIES:
        questions = (data / f"BFCL_v4_{category}.json").read_text().splitlines()
        answers = (data / "possible_answer" / f"BFCL_v4_{category}.json").read_text().splitlines()
        for question, answer in zip(map(json.loads, questions), map(json.loads, answers), strict=True):
            tools = "\n".join(map(signature, question["function"]))
            possible = answer["ground_truth"][0]
            rows.append({
                "messages": [{"role": "user", "content": f"{tools}\n\n{question['question'][0][0]['content']}"},
                             {"role": "assistant", "content": call(possible, question["function"])}],
                "functions": question["function"], "possible": possible})
    return rows


def split(rows: list[dict], test_share: float = 1 / 3, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Train and test rows. Questions that share a function, or a question's text, are on one side together."""
    group = list(range(len(rows)))

    def root(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        keys = [f"function {f['name']}" for f in row["functions"]] + [f"text {row['messages'][0]['content'].rsplit(chr(10), 1)[1]}"]
        for key in keys:
            group[root(i)] = root(first.setdefault(key, i))
    groups = defaultdict(list)
    for i, row in enumerate(rows):
        groups[root(i)].append(row)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    order.sort(key=len, reverse=True)  # the large groups, which cannot be split, train
    train: list[dict] = []
    while order and len(train) + len(order[0]) <= (1 - test_share) * len(rows):
        train += order.pop(0)
    return train, [row for rows in order for row in rows]


def write(out: Path) -> tuple[int, int]:
    """Write `train.jsonl` and `test.jsonl` to ``out``; returns how many rows each has."""
    sides = split(conversations(installed()))
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), sides, strict=True):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(sides[0]), len(sides[1])
