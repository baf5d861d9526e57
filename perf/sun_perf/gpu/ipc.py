"""A prompt's KV from another process's memory on the same GPU: opened, compared and copied into the pool."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from sun.decode.kv_pool import KVPool
from sun.handoff.cuda_driver import CudaDriver
from sun.handoff.device import DeviceBuffer, Driver
from sun_perf.gpu.books import Piece
from sun_perf.gpu.clock import median_ms
from sun_perf.gpu.plan import Plan
from sun_perf.gpu.stand_in import StandIn

PUBLISH_S = 60.0
END_S = 10.0
"""Most seconds until the other process has published, which imports torch first, and until it has ended."""


def driver_of(device: str, folder: Path) -> Driver:
    """That of a GPU, or files in its place."""
    return StandIn(folder) if device == "cpu" else CudaDriver(torch.device(device).index or 0)


def publish(device: str, folder: str, nbytes: int) -> None:
    """In a process of its own: random numbers of bf16 in exported memory, until standard input ends. Prints how to open it, and its checksum."""
    driver = driver_of(device, Path(folder))
    buffer = DeviceBuffer(driver, driver.allocate(nbytes), nbytes)
    torch.manual_seed(0)
    buffer.tensor().view(torch.bfloat16).copy_(torch.rand(nbytes // 2))
    driver.wait()
    print(json.dumps({"uuid": driver.uuid, "handle": driver.export(buffer.address).hex(), "checksum": buffer.checksum()}), flush=True)
    sys.stdin.read()


def told(process: subprocess.Popen) -> dict:
    """What the publishing process prints first. Raises RuntimeError if it ends without, or takes long."""
    if not select.select([process.stdout], [], [], PUBLISH_S)[0]:
        raise RuntimeError(f"the publishing process has published nothing in {PUBLISH_S:.0f} s")
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the publishing process ended with code {process.wait()}: {process.stderr.read()[-2000:]}")
    return json.loads(line)


def ipc(plan: Plan) -> Iterator[Piece]:
    """A row a prompt length: ms of opening, of the checksum, and of both `verified` and copied into the pool; GB/s of the copy alone.

    same: whether what the pool has is bit by bit what the other process wrote.
    """
    most, device = max(plan.prompts), str(plan.device)
    nbytes = plan.shape.kv_bytes(most, 2)
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-c", "import sys; from sun_perf.gpu.ipc import publish; publish(sys.argv[1], sys.argv[2], int(sys.argv[3]))", device, folder, str(nbytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            made, driver = told(process), driver_of(device, Path(folder))
            if made["uuid"] != driver.uuid:
                raise RuntimeError(f"the other process runs on GPU {made['uuid']}, this one on {driver.uuid}")
            started = time.perf_counter()
            address = driver.open(bytes.fromhex(made["handle"]))
            opening = (time.perf_counter() - started) * 1e3
            if DeviceBuffer(driver, address, nbytes).checksum() != made["checksum"]:
                raise RuntimeError("what was opened is not what the other process wrote")
            for tokens in plan.prompts:
                yield f"{tokens} tokens", partial(row, plan, DeviceBuffer(driver, address, plan.shape.kv_bytes(tokens, 2)), tokens, opening)
            driver.close(address)
        finally:
            try:
                process.communicate(timeout=END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def row(plan: Plan, buffer: DeviceBuffer, tokens: int, opening: float) -> Iterator[dict]:
    """One length's."""
    shape = plan.shape
    pool = KVPool(shape, tokens, plan.device, torch.bfloat16, spare=1)
    slot, times = pool.take(tokens), max(1, plan.times // 2)
    kv = buffer.tensor().view(torch.bfloat16).view(shape.layers, 2, shape.kv_heads, tokens, shape.head_dim)

    def both() -> None:
        with pool.beside():
            buffer.checksum()
            pool.fill(slot, kv)

    copied = median_ms(lambda: pool.fill(slot, kv), plan.device, times)
    summed = median_ms(buffer.checksum, plan.device, times)
    verified = median_ms(both, plan.device, times)
    yield {
        "tokens": tokens, "mb": round(buffer.nbytes / 1e6, 2), "open_ms": round(opening, 3), "copy_ms": round(copied, 3), "checksum_ms": round(summed, 3),
        "verified_ms": round(verified, 3), "verified_us_per_token": round(verified * 1e3 / tokens, 2), "copy_gb_s": round(buffer.nbytes / 1e6 / copied, 2),
        "same": bool(torch.equal(pool.view(slot, tokens), kv))}
