"""What an answer is worth: 1 if it is right, else 0, by the task's metric."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from sun_build import bfcl

OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}


Row = dict[str, Any] | None
"""The fields of a test row beside its messages; only BFCL needs them."""


def exact(answer: str, reference: str, row: Row = None) -> bool:
    """Equal but for surrounding whitespace."""
    return answer.strip() == reference.strip()


def command(answer: str, reference: str, row: Row = None) -> bool:
    """Equal after runs of whitespace are made one space (NL2Bash's exact match)."""
    return answer.split() == reference.split()


def utility(answer: str, reference: str, row: Row = None) -> bool:
    """The same program is called: the first words are equal."""
    return answer.split()[:1] == reference.split()[:1]


def flags(answer: str, reference: str, row: Row = None) -> bool:
    """The same program is called with the same flags, whatever their order and their values (`-mtime -7`, `--color=auto`, `head -5`).

    A cluster of short flags, or one with its value, is taken as one word: `-la` is not `-al`, nor `-n5` `-n9`. A flag that is a digit,
    as in `ls -1`, is taken for a value.
    """
    return utility(answer, reference) and _flags(answer) == _flags(reference)


def _flags(text: str) -> set[str]:
    return {word.split("=")[0] for word in text.split() if word.startswith("-") and not word[1:2].isdigit()}


def tool_call(answer: str, reference: str, row: Row = None) -> bool:
    """BFCL's AST match; needs the row's "functions" and "possible"."""
    try:
        call = bfcl.parse_call(answer)
    except ValueError:
        return False
    return bfcl.matches(call, row["functions"], row["possible"])


def expression(answer: str, reference: str, row: Row = None) -> bool:
    """The expressions left of ``=`` have the same value, to 1e-3."""
    try:
        return abs(value(answer) - value(reference)) <= 1e-3
    except ValueError:
        return False


def value(text: str) -> float:
    """Value of the arithmetic left of ``=`` in ``text``. Raises ValueError if that is anything but numbers, + - * / and parentheses."""
    try:
        return _value(ast.parse(text.split("=")[0].strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"not an expression: {text[:80]!r}") from error


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError(f"not arithmetic: {ast.dump(node)[:80]}")


METRICS: dict[str, Callable[[str, str, Row], bool]] = {
    "exact": exact, "intent": exact, "bash": command, "utility": utility, "flags": flags, "math": expression, "bfcl": tool_call,
}


def check(metric: str, reference: str, row: dict[str, Any]) -> None:
    """Raise ValueError if no answer could be right: the reference, or what the row has beside the messages, is not what ``metric`` compares with."""
    if metric == "math":
        try:
            value(reference)
        except ValueError as error:
            raise ValueError(f"metric math: the reference is {error}; expected numbers, + - * / and parentheses, left of an =") from error
    if metric == "bfcl":
        bfcl.check(row.get("functions"), row.get("possible"))
