"""An export that computes something else than torch is not let through, whichever output, prompt or kind of wrong it is."""

from __future__ import annotations

import math

import pytest
import torch

from sun.model.loading import load_prefill
from sun_build.export.parity import LENGTHS, LIMITS, check, compare, torch_outputs
from tests.unit import tiny


@pytest.fixture(scope="module")
def model(base_dir, tmp_path_factory):
    """A task's torch module."""
    made = tmp_path_factory.mktemp("made")
    return load_prefill(base_dir, tiny.task(made, base_dir, "mine", "lora", tiny.adapter(made / "adapter", base_dir)))[1]


def exported(model, states: bool, spoil=lambda kv, last, length: None):
    """What an export computes of a padded batch, row by row; ``spoil`` may change a row's outputs."""

    def compute(ids):
        kv, last = torch.zeros(len(ids), *torch_outputs(model, ids[0])[0].shape), torch.zeros(*ids.shape, model.base.hidden)
        for i, row in enumerate(ids):
            length = int(row.ne(0).nonzero().max()) + 1
            made, *state = torch_outputs(model, row[:length], states)
            kv[i, ..., :length, :] = made
            if states:
                last[i, length - 1] = state[0]
            spoil(kv[i], last[i, length - 1], length)
        return [kv, last] if states else [kv]

    return compute


@pytest.mark.parametrize("states", [False, True])
def test_the_same_values_are_let_through(model, states):
    parity = compare(exported(model, states), model, "here", 2, states=states)
    assert (parity.max_error, parity.tokens) == (0, sum(LENGTHS)) and parity.largest > 0
    check(parity, "fp32")


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e3])
@pytest.mark.parametrize("output", ["kv", "state"])
@pytest.mark.parametrize("length", [LENGTHS[0], LENGTHS[2], LENGTHS[-1]])
def test_one_wrong_value_of_one_prompt_is_not(model, value, output, length):
    def spoil(kv, state, tokens):
        if tokens == length:
            kv[0, 0, 0, tokens - 1, 0] = value if output == "kv" else kv[0, 0, 0, tokens - 1, 0]
            state[0] = value if output == "state" else state[0]

    for dtype in LIMITS:
        with pytest.raises(RuntimeError, match="the export differs by"):
            check(compare(exported(model, True, spoil), model, "here", 2, states=True), dtype)
