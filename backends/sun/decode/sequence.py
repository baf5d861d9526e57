"""One sequence in a decode worker."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sun.decode.kv_pool import Slot
from sun.handoff.ticket import Ticket
from sun.messages import Admit


@dataclass(eq=False)
class Sequence:
    """A request's decoding state: the next token to run is ``last``, at ``position``; ``slot`` holds K and V before it.

    replayed: of the tokens that another worker has sampled, how many have their predecessor's K and V in the slot.
    hidden: xn's state after the last layer (float32 [hidden], on the CPU), where the prefill module has run xn, until the first token is chosen from it.
    """

    admit: Admit
    ticket: Ticket
    shipment: list[bytes]
    stop_ids: frozenset[int]
    generated: list[int] = field(init=False)
    replayed: int = field(init=False)
    hidden: Tensor | None = None
    slot: Slot | None = None
    aborted: bool = False

    def __post_init__(self) -> None:
        self.generated = list(self.admit.generated)
        self.replayed = 1 if self.ticket.hidden else 0

    @property
    def need(self) -> int:
        """Slot size in tokens."""
        return self.admit.need

    @property
    def position(self) -> int:
        """Position of the token to run next."""
        return len(self.admit.prompt) - 1 + len(self.generated)

    @property
    def last(self) -> int:
        """The token to run next: xn, unless `hidden` is there, then what was sampled."""
        return self.generated[-1] if self.generated else self.admit.prompt[-1]

    @property
    def outstanding(self) -> int:
        """Tokens it may still generate."""
        return self.admit.params.max_tokens - len(self.generated)

    @property
    def to_replay(self) -> bool:
        """Whether K and V of tokens sampled elsewhere are still missing; until then it takes no part in a step."""
        return self.replayed < len(self.admit.generated)

    def replay(self, most: int) -> tuple[list[int], list[int]]:
        """The next ``most`` or fewer tokens to run again, and their positions: xn, and all that was sampled but the last."""
        first, tokens = self.replayed, [self.admit.prompt[-1], *self.admit.generated[:-1]]
        part = tokens[first : first + most]
        return part, [len(self.admit.prompt) - 1 + first + i for i in range(len(part))]

    def banned(self) -> list[int]:
        """Tokens that may not come next, because min_tokens is not reached."""
        return list(self.stop_ids) if len(self.generated) < self.admit.params.min_tokens else []

    def finish_reason(self) -> str | None:
        """Why it ends with the token generated last, if it does."""
        if self.generated[-1] in self.stop_ids:
            return "stop"
        return "length" if self.outstanding <= 0 else None

    def ids(self) -> tuple[Tensor, Tensor]:
        """Prompt and generated token ids (int64), for the penalties."""
        return torch.tensor(self.admit.prompt), torch.tensor(self.generated, dtype=torch.int64)
