"""The whole pipeline in one process, without Triton: for tests, evaluation and measuring the bare engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sun.decode.cpu import CpuExecutor
from sun.decode.engine import DecodeEngine
from sun.decode.kv_pool import KVPool
from sun.handoff.inline import Inline
from sun.handoff.transport import Transport
from sun.messages import NO_STEPS, Ack, Admit, Stats, StepEvents
from sun.model.loading import load_decode, load_prefill, module_name
from sun.model.quantise import FULL
from sun.prefill.engine import PrefillEngine
from sun.slots import KV_TOKENS


class LocalFleet:
    """A `sun.router.fleet.Fleet` of engines in this process.

    task_dirs: task -> the folder of its manifest and weights. workers: how many decode engines share the module.
    scheme, own: of the decode module, see `load_decode`. prefill_scheme: see `load_prefill`. threads: see `DecodeEngine`.
    """

    def __init__(self, base_dir: str | Path, task_dirs: dict[str, Path], workers: int = 1, kv_tokens: int = KV_TOKENS,
                 transport: Transport | None = None, token_budget: int = 512, max_batch: int = 64,
                 scheme: str = FULL, own: Path | None = None, threads: int | None = None, prefill_scheme: str = FULL):
        transport = transport or Inline()
        base, model = load_decode(base_dir, scheme, own)
        self.prefills: dict[str, PrefillEngine] = {}
        for name, folder in task_dirs.items():
            task, module = load_prefill(base_dir, folder, prefill_scheme)
            self.prefills[name] = PrefillEngine(module, task, transport, token_budget)
        self.decodes: dict[str, DecodeEngine] = {}
        module = module_name(base, scheme, own)
        for i in range(workers):
            pool = KVPool(base.geometry, kv_tokens)
            executor = CpuExecutor(model, pool, threads or 1)
            self.decodes[f"decode_{i}"] = DecodeEngine(base, executor, pool, [transport], max_batch, threads, module=module)

    def prefill(self, task: str, ids: list[int]) -> list[bytes]:
        """See `Fleet.prefill`."""
        return self.prefills[task].submit(ids).result()

    def present(self, task: str) -> bool:
        """See `Fleet.present`."""
        return task in self.prefills

    def admit(self, worker: str, admit: Admit, shipment: list[bytes]) -> Ack:
        """See `Fleet.admit`."""
        return self.decodes[worker].admit(admit, shipment)

    def abort(self, worker: str, ids: list[str]) -> Ack:
        """See `Fleet.abort`."""
        return self.decodes[worker].abort(ids)

    def stats(self, worker: str) -> Stats:
        """See `Fleet.stats`."""
        return self.decodes[worker].stats(after=NO_STEPS)

    def listen(self, worker: str, router: str) -> Iterator[StepEvents]:
        """See `Fleet.listen`."""
        for steps in self.decodes[worker].outbox.listen(router):
            yield from steps

    def close(self) -> None:
        """Stop all engines."""
        for engine in (*self.prefills.values(), *self.decodes.values()):
            engine.close()
