"""Which transports there are, and a prefill's and a decode worker's own, made of their settings."""

from __future__ import annotations

import torch

from sun import gpu
from sun.handoff import cuda_driver
from sun.handoff.cuda_ipc import UNIT, CudaIpc
from sun.handoff.inline import Inline
from sun.handoff.shm import LEASE_S, Shm
from sun.handoff.transport import Transport

TRANSPORTS = (Shm.name, Inline.name, CudaIpc.name)


def why_not(transport: str) -> str | None:
    """What keeps a transport from working here; None if nothing does."""
    return gpu.missing() or cuda_driver.missing() if transport == CudaIpc.name else None


def publisher(transport: str, lease_s: float = LEASE_S, device: str | None = None, room: int = 0, most: int = 0) -> Transport:
    """What a prefill publishes by. device: the GPU that it runs on, if any; room: bytes there for KV on its way, for `cuda_ipc`.

    most: bytes of tickets by `shm` that may be outstanding; 0 for no limit.

    Raises ValueError naming the parameter, RuntimeError for a transport that does not work here.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"transport: got {transport!r}, expected one of {', '.join(TRANSPORTS)}")
    if transport == Inline.name:
        return Inline()
    if transport == CudaIpc.name:
        if device is None:
            raise ValueError("transport: cuda_ipc is for KV that lies on a GPU, which executor cuda leaves there")
        if room < UNIT:
            raise ValueError("handoff_tokens: must be 1 or more")
        if reason := why_not(transport):
            raise RuntimeError(f"transport: cuda_ipc does not work here: {reason}")
    if transport == Shm.name:
        return Shm(publisher=True, lease_s=lease_s, most=most)
    return CudaIpc(Shm(publisher=True, lease_s=lease_s), driver(device), room)


def pullers(device: str | None = None) -> list[Transport]:
    """What a decode worker pulls by, on a GPU or not."""
    shm = Shm()
    made: list[Transport] = [shm, Inline()]
    if device is not None and why_not(CudaIpc.name) is None:
        made.append(CudaIpc(shm, driver(device)))
    return made


def driver(device: str) -> cuda_driver.CudaDriver:
    """That of a GPU by torch's name of it."""
    return cuda_driver.CudaDriver(torch.device(device).index or 0)
