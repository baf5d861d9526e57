"""BFCL's AST match, and a split of its questions that leaks nothing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun_build import bfcl, bfcl_data
from sun_build.metrics import METRICS

FUNCTIONS = [
    {"name": "trip.book", "description": "Book a trip. It is final.", "parameters": {"type": "dict", "required": ["city", "days"], "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "budget": {"type": "float", "default": 10.0}, "stops": {"type": "array", "items": {"type": "string"}},
        "guest": {"type": "dict"}, "window": {"type": "boolean"}, "at": {"type": "tuple", "items": {"type": "float"}}}}},
    {"name": "trip.cancel", "description": "Cancel", "parameters": {"type": "dict", "required": [], "properties": {}}},
]
POSSIBLE = {"trip.book": {
    "city": ["New York", "NY"], "days": [3], "budget": [100.0, ""], "stops": [["Boston, MA", "Salem"], ""],
    "guest": [{"name": ["Ann"], "age": [30, ""]}, ""], "window": [True, ""], "at": [[1.0, 2.5], ""]}}


@pytest.mark.parametrize(("answer", "right"), [
    ("trip.book(city='New York', days=3)", True),
    ("[trip.book(city='new-york.', days=3)]", True),
    ("trip.book(city='NY', days=3, budget=100)", True),
    ("trip.book(city='NY', days=3, budget=101.0)", False),
    ("trip.book(city='NY', days=3.0)", False),
    ("trip.book(city='NY', days='3')", False),
    ("trip.book(city='NY')", False),
    ("trip.book(days=3)", False),
    ("trip.book(city='NY', days=3, pets=1)", False),
    ("trip.book(city='NY', days=3, stops=['boston ma', 'SALEM'])", True),
    ("trip.book(city='NY', days=3, stops=['Salem', 'Boston, MA'])", False),
    ("trip.book(city='NY', days=3, stops=[1, 2])", False),
    ("trip.book(city='NY', days=3, guest={'name': 'ANN'})", True),
    ("trip.book(city='NY', days=3, guest={'age': 30})", False),
    ("trip.book(city='NY', days=3, guest={'name': 'Ann', 'x': 1})", False),
    ("trip.book(city='NY', days=3, window=True)", True),
    ("trip.book(city='NY', days=3, window=1)", False),
    ("trip.book(city='NY', days=3, at=(1.0, 2.5))", True),
    ("trip.cancel(city='NY', days=3)", False),
    ("book(city='NY', days=3)", False),
    ("trip.book(city='NY', days=3), trip.book(city='NY', days=3)", False),
    ("I would call trip.book", False),
    ("trip.book(city='NY', days=3", False),
    ("", False),
])
def test_a_call_is_right_by_bfcls_rules(answer, right):
    assert METRICS["bfcl"](answer, "", {"functions": FUNCTIONS, "possible": POSSIBLE}) is right


@given(st.text(max_size=60))
def test_any_text_is_a_call_or_refused_and_nothing_of_it_is_run(text):
    assert METRICS["bfcl"](text, "", {"functions": FUNCTIONS, "possible": POSSIBLE}) in (True, False)


def test_what_a_model_wrote_is_never_evaluated(tmp_path):
    victim = tmp_path / "x"
    METRICS["bfcl"](f"trip.book(city=open({str(victim)!r}, 'w'), days=1 + 2)", "", {"functions": FUNCTIONS, "possible": POSSIBLE})
    assert not victim.exists()


def test_the_reference_call_is_itself_right():
    call = bfcl_data.call(POSSIBLE, FUNCTIONS)
    assert call == "trip.book(city='New York', days=3)"
    assert bfcl.matches(bfcl.parse_call(call), FUNCTIONS, POSSIBLE)


def test_a_signature_is_one_line_with_types_and_defaults():
    line = bfcl_data.signature(FUNCTIONS[0])
    assert line.startswith("trip.book(city: str, days: int, budget: float = 10.0, stops: list[str] = None") and line.endswith(": Book a trip")


rows = st.lists(st.tuples(st.sets(st.integers(0, 12), min_size=1, max_size=3), st.integers(0, 30)), min_size=3, max_size=40)


@given(rows)
def test_no_function_and_no_question_is_on_both_sides(made):
    made = [{"messages": [{"role": "user", "content": f"tools\n\nquestion {text}"}], "functions": [{"name": str(n)} for n in names]} for names, text in made]
    train, test = bfcl_data.split(made)
    assert len(train) + len(test) == len(made)
    for key in (lambda row: {f["name"] for f in row["functions"]}, lambda row: {row["messages"][0]["content"]}):
        sides = [set().union(*map(key, side)) for side in (train, test)]
        assert not sides[0] & sides[1]


def test_the_installed_questions_split_and_their_references_are_right(tmp_path):
    train, test = bfcl_data.write(tmp_path)
    assert (train, test) == (400, 200)
    for name in ("train", "test"):
        for row in map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines()):
            assert METRICS["bfcl"](row["messages"][1]["content"], "", row)
