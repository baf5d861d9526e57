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
    """A request's decoding state: the next token to run is ``last``, at ``position``; ``slot`` holds K and V before it."""

    admit: Admit
    ticket: Ticket
    shipment: list[bytes]
    stop_ids: frozenset[int]
    generated: list[int] = field(default_factory=list)
    slot: Slot | None = None
    aborted: bool = False

    @property
    def need(self) -> int:
        """Slot size in tokens: the last sampled token's K and V are never needed."""
        return len(self.admit.prompt) + self.admit.params.max_tokens - 1

    @property
    def position(self) -> int:
        """Position of the token to run next."""
        return len(self.admit.prompt) - 1 + len(self.generated)

    @property
    def last(self) -> int:
        """The token to run next: xn, then what was sampled."""
        return self.generated[-1] if self.generated else self.admit.prompt[-1]

    @property
    def outstanding(self) -> int:
        """Tokens it may still generate."""
        return self.admit.params.max_tokens - len(self.generated)

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
