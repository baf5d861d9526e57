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


def kv_tensor(buffer: Buffer, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Tensor of ``shape`` over the first bytes of ``buffer``, without a copy."""
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    if isinstance(buffer, DeviceBuffer):
        return buffer.tensor()[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a read-only buffer is fine: nobody writes to a pulled KV
        return torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape)).view(shape)


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
    return behind(buffer, ticket.kv_bytes) if ticket.hidden else None


def behind(buffer: Buffer, nbytes: int) -> Tensor:
    """float32 over what comes after the first ``nbytes`` of ``buffer``, without a copy."""
    if isinstance(buffer, DeviceBuffer):
        return buffer.tensor()[nbytes:].view(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # as above
        return torch.frombuffer(buffer, dtype=torch.float32, offset=nbytes)
