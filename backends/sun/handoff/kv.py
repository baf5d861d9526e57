"""KV bytes as tensors. Apart from the transports, so that who only passes tickets on needs no torch."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from sun.handoff.device import DeviceBuffer
from sun.handoff.ticket import Ticket, TicketError, checksum
from sun.handoff.transport import Buffer


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""A ticket's dtypes as torch has them."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def kv_tensor(buffer: Buffer, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
    """Tensor of ``shape`` over the bytes of ``buffer`` from ``offset`` on, without a copy."""
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    if isinstance(buffer, DeviceBuffer):
        return buffer.tensor()[offset : offset + count * dtype.itemsize].view(dtype).view(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a read-only buffer is fine: nobody writes to a pulled KV
        return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).view(shape)


def verified_kv(ticket: Ticket, buffer: Buffer) -> Tensor:
    """K and V [layers, 2, kv_heads, tokens, head_dim] in the ticket's dtype if ``buffer`` is, by size and checksum, what the ticket describes.

    Raises TicketError naming the field otherwise.
    """
    if buffer.nbytes != ticket.nbytes:
        raise TicketError(f"ticket.tokens: {ticket.tokens} tokens are {ticket.nbytes} bytes of KV, but {buffer.nbytes} arrived")
    got = checksum(buffer)
    if got != ticket.checksum:
        raise TicketError(f"ticket.checksum: says {ticket.checksum}, the KV's is {got}")
    geometry = ticket.geometry
    return kv_tensor(buffer, (geometry.layers, 2, geometry.kv_heads, ticket.tokens, geometry.head_dim), DTYPES[ticket.dtype])


def hidden_state(ticket: Ticket, buffer: Buffer) -> Tensor | None:
    """The state of xn [hidden] (float32) behind a KV that `verified_kv` has let through, without a copy; None if the ticket has none."""
    return kv_tensor(buffer, (ticket.hidden,), offset=ticket.kv_bytes) if ticket.hidden else None
