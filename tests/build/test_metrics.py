"""Metrics: an answer is right when it means the reference, and a broken one is only wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sun_build.metrics import METRICS, value


@pytest.mark.parametrize("metric, answer, reference, right", [
    ("intent", " card arrival\n", "card arrival", True),
    ("intent", "card arrivals", "card arrival", False),
    ("bash", "find .  -type f", "find . -type f", True),
    ("bash", "find . -type d", "find . -type f", False),
    ("utility", "find / -name x", "find . -type f", True),
    ("utility", "ls", "find . -type f", False),
    ("utility", "", "find", False),
    ("flags", "find . -mtime -7 -type f", "find / -type d -mtime -3", True),
    ("flags", "ls --color=auto", "ls --color=never", True),
    ("flags", "head -5 a", "head -9 b", True),
    ("flags", "find . -type f", "find . -name f", False),
    ("flags", "ls -la", "ls -al", False),
    ("math", "4 * 8 = 33", "(2 + 2) * 8 = 32", True),
    ("math", "4 * 9 = 32", "4 * 8 = 32", False),
    ("math", "1 / 3", "0.3333 = 0.33", True),
    ("math", "1 / 0 = 1", "1 = 1", False),
    ("math", "__import__('os') = 1", "1 = 1", False),
    ("math", "", "1 = 1", False),
])
def test_metric(metric, answer, reference, right):
    assert METRICS[metric](answer, reference) is right


@given(st.text(max_size=60))
def test_any_text_has_a_value_or_none(text):
    try:
        assert isinstance(value(text), float)
    except ValueError:
        pass


@given(st.integers(0, 999), st.sampled_from("+-*"), st.integers(0, 999))
def test_value_is_pythons_own(a, op, b):
    assert value(f"({a} {op} {b}) = 1") == eval(f"{a} {op} {b}")
