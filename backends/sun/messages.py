"""What a router and a decode worker say to each other. JSON, so the same messages serve BLS, gRPC and a person with curl."""

from __future__ import annotations

import msgspec

from sun.decode.params import SamplingParams


class Admit(msgspec.Struct, frozen=True, kw_only=True, tag="admit", forbid_unknown_fields=True):
    """Decode one sequence. Its shipment follows as the message tensor's further elements.

    id: unique per sequence. router: who hears its events, see `sun.events`. prompt: token ids x1..xn; the ticket holds K and V of all but the last.
    generated: what another worker has sampled already; it is replayed, not sampled again, and no event tells of it.
    module: the decode module that sampled it; a worker with another one refuses.
    """

    id: str
    router: str
    task: str
    prompt: list[int]
    params: SamplingParams
    generated: list[int] = []
    module: str = ""

    @property
    def need(self) -> int:
        """KV slots, in tokens, that it takes: the last sampled token's K and V are never needed."""
        return len(self.prompt) + self.params.max_tokens - 1


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort", forbid_unknown_fields=True):
    """Drop these sequences at once; unknown ones are ignored."""

    ids: list[str]


NO_STEPS = 2**62
"""A step that never comes: `GetStats` after it asks for the state alone."""


class GetStats(msgspec.Struct, frozen=True, kw_only=True, tag="stats", forbid_unknown_fields=True):
    """Ask for the worker's state and its steps after step number ``after``."""

    after: int = 0


class Drain(msgspec.Struct, frozen=True, kw_only=True, tag="drain", forbid_unknown_fields=True):
    """Take no new sequences, or take them again (``on`` false). For operators: key is the server's, see `sun.key.check_key`.

    evict: also drop those that are here, for their routers to find other workers of the same module.
    """

    key: str
    on: bool = True
    evict: bool = False


Request = Admit | Abort | GetStats | Drain


class Load(msgspec.Struct, frozen=True):
    """What a worker has to do: the tokens that its sequences may still generate, and how many sequences these are.

    room: KV slots, in tokens, that are free and that no sequence waits for; below 0 if more are waited for than are free.
    at: nanoseconds of the worker's own clock, which never goes back; of two loads the later one holds, whichever comes last.
    """

    tokens: int
    sequences: int
    room: int = 0
    at: int = 0

    def __add__(self, other: Load) -> Load:
        """Both together, as of the later one."""
        return Load(self.tokens + other.tokens, self.sequences + other.sequences, self.room + other.room, max(self.at, other.at))


class Ack(msgspec.Struct, frozen=True, kw_only=True, tag="ack"):
    """An `Admit`, `Abort` or `Drain` was taken; but an `Admit` was not if the worker is ``draining``.

    module: what it decodes with; two of one name give the same bits.
    """

    load: Load
    draining: bool = False
    module: str = ""


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence's part of a step: a token, or the error that ended it.

    finish: "stop" (an end-of-turn or stop token, which ``token`` then is), "length" or "error".
    """

    id: str
    token: int | None = None
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None
    finish: str | None = None
    error: str | None = None


class StepEvents(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """Everything one step brought for one router. load: after the step."""

    step: int
    load: Load
    events: list[TokenEvent]


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A past step: its number, duration in ms, and how many sequences of each task it decoded."""

    step: int
    ms: float
    tasks: dict[str, int]


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag="state"):
    """A worker's state. Tokens count KV slots; steps are the latest ones, oldest first. draining, module: as in `Ack`."""

    running: int
    waiting: int
    load: Load
    free_tokens: int
    budget_tokens: int
    step: int
    steps: list[StepRecord]
    draining: bool = False
    module: str = ""

    @property
    def shown_module(self) -> str:
        """The module's name for people, its digest cut."""
        return " ".join(word[:19] for word in self.module.split())

    @property
    def idle(self) -> bool:
        """Whether it has no sequence, and every slot is free."""
        return self.running + self.waiting == 0 and self.free_tokens == self.budget_tokens


Reply = Ack | StepEvents | Stats

_request = msgspec.json.Decoder(Request)
_reply = msgspec.json.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    """A message as JSON."""
    return msgspec.json.encode(message)


def decode_request(data: bytes) -> Request:
    """Parse a request; raises ValueError naming the field at fault."""
    return _request.decode(data)


def decode_reply(data: bytes) -> Reply:
    """Parse a reply."""
    return _reply.decode(data)
