"""Times on a device, and how fast it reads its memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warm_ups(times: int) -> int:
    """Runs before ``times`` that count; none where a single run only shows that it runs."""
    return 3 if times > 1 else 0


def median_ms(run: Callable[[], object], device: torch.device, times: int) -> float:
    """Median ms of ``times`` runs by the host's clock, each waited for: what a decode loop sees."""
    for _ in range(warm_ups(times)):
        run()
    taken = []
    for _ in range(times):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(taken)


def device_ms(run: Callable[[], object], device: torch.device, times: int) -> float:
    """Mean ms of a run among ``times`` in a row, by the device's own events: no waiting between them."""
    if device.type != "cuda":
        return median_ms(run, device, times)
    for _ in range(warm_ups(times)):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``run`` as one CUDA graph, so that its kernels are timed and not their launches; on the CPU itself."""
    if device.type != "cuda":
        return run
    run()  # compiles what is new, which a capture must not
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@dataclass(frozen=True)
class Bandwidth:
    """GB/s of device memory: read by a sum, read and written by a copy. The better one is the floor's."""

    read_gb_s: float
    copy_gb_s: float

    @classmethod
    def measure(cls, device: torch.device, nbytes: int, times: int = 20) -> Bandwidth:
        """On random numbers of ``nbytes``, which should be far beyond the cache."""
        buffer = torch.rand(nbytes // 4, device=device)
        other = torch.empty_like(buffer)
        read, copy = (nbytes * n / 1e6 / device_ms(run, device, times) for n, run in ((1, buffer.sum), (2, lambda: other.copy_(buffer))))
        return cls(round(read, 1), round(copy, 1))

    @property
    def best(self) -> float:
        """GB/s that a floor is of."""
        return max(self.read_gb_s, self.copy_gb_s)

    def as_dict(self) -> dict[str, float]:
        """As it is written to JSON."""
        return asdict(self)
