"""BFCL's AST match for one Python call (categories simple and multiple): is it the right function with acceptable arguments?

Written after the published rules of the Berkeley Function Calling Leaderboard (bfcl-eval 2026.3.23, `ast_checker.py`, Apache-2.0),
whose own module imports the clients of every model it rates, and evaluates what a model wrote.
"""

from __future__ import annotations

import ast
import re
from typing import Any

TYPES = {"string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list, "dict": dict, "any": str}
IGNORED = re.compile(r"[ ,./\-_*^]")
Args = dict[str, Any]


def check(functions: Any, possible: Any) -> None:
    """Raise ValueError if these are not a test row's functions and acceptable calls, as `matches` takes them."""
    try:
        (name, acceptable), = possible.items()
        details = next(f for f in functions if f["name"] == name)["parameters"]
        kinds = [detail for parameter in details["properties"].values() for detail in (parameter, parameter.get("items"))]
        unknown = {str(detail["type"]) for detail in kinds if detail and detail["type"] not in TYPES}
        whole = all(isinstance(values, list) for values in acceptable.values()) and not any(
            parameter["type"] in ("array", "tuple") and "items" not in parameter for parameter in details["properties"].values())
    except (AttributeError, KeyError, TypeError, ValueError, StopIteration):
        whole, unknown = False, set()
    if unknown:
        raise ValueError(f"metric bfcl: functions: type {', '.join(sorted(unknown))} is none of BFCL's, {', '.join(TYPES)}")
    if not whole:
        raise ValueError("metric bfcl needs functions, BFCL's descriptions, and possible, {name of one of them: {parameter: [acceptable values]}}, beside the messages")


def parse_call(text: str) -> tuple[str, Args]:
    """Name and keyword arguments of the one call in ``text``, in brackets or not. Raises ValueError if it is anything else."""
    text = text.strip("`\n '")
    try:
        node = ast.parse(text, mode="eval").body
        if isinstance(node, ast.List | ast.Tuple) and len(node.elts) == 1:
            node = node.elts[0]
        if not isinstance(node, ast.Call):
            raise ValueError(f"not a call: {text[:80]!r}")
        return ast.unparse(node.func), {word.arg: _literal(word.value) for word in node.keywords if word.arg is not None}
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not Python: {text[:80]!r}") from error


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return ast.unparse(node)  # a name or an expression counts as its text


def matches(call: tuple[str, Args], functions: list[dict], possible: dict[str, dict[str, list]]) -> bool:
    """Whether a call is right.

    functions: BFCL's function descriptions. possible: {name: {parameter: acceptable values}}; "" among them means that
    the parameter may be left out.
    """
    (name, acceptable), (called, given) = next(iter(possible.items())), call
    details = next(f for f in functions if f["name"] == name)["parameters"]
    if called != name or any(parameter not in given for parameter in details.get("required", [])):
        return False
    if any(parameter not in given and "" not in values for parameter, values in acceptable.items()):
        return False
    return all(
        parameter in details["properties"] and parameter in acceptable and _accepts(value, details["properties"][parameter], acceptable[parameter])
        for parameter, value in given.items())


def _accepts(value: Any, detail: dict, acceptable: list) -> bool:
    kind = TYPES[detail["type"]]
    if detail["type"] == "tuple" and isinstance(value, tuple):
        value = list(value)
    if detail["type"] == "float" and type(value) is int:
        value = float(value)
    said = [answer for answer in acceptable if answer != ""]
    if type(value) is not kind:
        # A variable's name in place of a value: its answer is a string whatever the parameter's type.
        return bool(said) and type(value) is type(said[0]) and value in acceptable
    if kind is list and not _items_fit(value, detail, acceptable):
        return False
    # The answer is a variable's name: compared as it is.
    if said and type(said[0]) is not kind:
        return value in acceptable
    if kind is dict:
        return any(_dict_accepts(value, answer) for answer in said)
    if kind is list and TYPES[detail["items"]["type"]] is dict:
        return any(len(value) == len(answer) and all(map(_dict_accepts, value, answer)) for answer in said)
    if kind in (str, list):
        return _plain(value) in [_plain(answer) for answer in acceptable]
    return value in acceptable


def _items_fit(value: list, detail: dict, acceptable: list) -> bool:
    """Whether the items have the described type, or that of the items of an acceptable list."""
    kind = TYPES[detail["items"]["type"]]
    return any(
        all(type(item) is kind or (answer and type(item) is type(next((a for a in answer if a != ""), None))) for item in value)
        for answer in acceptable if isinstance(answer, list)) or "" in acceptable and not value


def _dict_accepts(value: Any, acceptable: dict[str, list]) -> bool:
    return isinstance(value, dict) and all(
        key in acceptable and _plain(item) in [_plain(answer) for answer in acceptable[key]] for key, item in value.items()
    ) and all(key in value or "" in answers for key, answers in acceptable.items())


def _plain(value: Any) -> Any:
    """A string without spaces, punctuation and case, as April 1, 2024 is April 1,2024; a list's strings likewise."""
    if isinstance(value, str):
        return IGNORED.sub("", value).lower().replace("'", '"')
    if isinstance(value, list):
        return [_plain(item) if isinstance(item, str) else item for item in value]
    return value
