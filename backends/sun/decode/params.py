"""Sampling parameters, named as in vLLM, with their limits."""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
from msgspec import Meta

MAX_STOP = 16
MAX_LOGPROBS = 20

MOST = 2**31 - 1
"""Of counts and token ids: far more than there is of anything. What 64 bits do not hold would fail in a step, and with it all others in the batch."""

Positive = Annotated[int, Meta(ge=1, le=MOST)]
Count = Annotated[int, Meta(ge=0, le=MOST)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one sequence's tokens are chosen and when it ends.

    temperature 0 is greedy. top_k 0 or -1 means all. seed: same seed, same text; without one the router draws it.
    logprobs: how many alternatives to report a token with, from the unmodified logits. stop: strings that end the text
    and are not part of it. min_tokens: before that many, neither the end-of-turn token nor anything of `stop` and `stop_token_ids` ends it.
    ignore_eos: go on after the end-of-turn token.
    """

    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=MOST)] = -1
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    max_tokens: Positive = 128
    min_tokens: Count = 0
    stop: Annotated[list[Annotated[str, Meta(min_length=1, max_length=256)]], Meta(max_length=MAX_STOP)] = []
    stop_token_ids: Annotated[list[Count], Meta(max_length=MAX_STOP)] = []
    ignore_eos: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}, more than max_tokens ({self.max_tokens})")
        for i, stop in enumerate(self.stop):
            if any("\ud800" <= character <= "\udfff" for character in stop):  # JSON can spell half a character, which no text has
                raise ValueError(f"stop[{i}] is not valid Unicode")

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens change the logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def sampling_params(values: dict[str, Any]) -> SamplingParams:
    """Validate a request's sampling keys. Raises ValueError naming the key and its limit."""
    values = dict(values)
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    for name, value in values.items():
        # msgspec compares with limits, which a NaN always passes or fails with a message about the limit.
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"sampling_parameters.{name}: must be a finite number, got {value}")
    try:
        return msgspec.convert(values, SamplingParams)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`")
        raise ValueError(f"sampling_parameters{field}: {reason[0].lower()}{reason[1:]}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"sampling_parameters: not valid Unicode: {error.reason}") from error
