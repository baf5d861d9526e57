"""Tokens a second through tritonserver's gRPC streams against those of the same engine in this process, in turn and at the same batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from sun.decode.params import sampling_params
from sun.local import LocalFleet
from sun.messages import Admit
from sun.model.manifest import BaseManifest
from sun.text.prompt import PromptFormat
from sun_client.server import Ports
from sun_perf.fleet_layout import KV_TOKENS, SYSTEMS, Material, lay_out, task_names
from sun_perf.load import Load
from sun_perf.running import running
from sun_perf.samples import Sample, batch_rate, ratio
from sun_perf.workload import Lengths, Request, draw

BATCH = 16
TOKENS = 64
"""Enough that the first request still decodes when the last one's prompt is done."""
ROUTER = "bench"


def measure(scratch: Path, ports: Ports, load: Load, material: Material, rounds: int) -> dict:
    """Measure ``rounds`` times each, the server first. Each time ``BATCH`` requests of ``TOKENS`` tokens; counted is the time in which all decode.

    Both have one decode worker with the material's threads and float32 weights. Returns tokens a second of each turn and their ratio.
    """
    (task,) = task_names(1)
    root = lay_out(scratch / "server_over_engine", scratch / "full", material, SYSTEMS["sun"], 1)
    requests = draw([task], 0, BATCH, 0, Lengths(24, 0, 24, 24), Lengths(TOKENS, 0, TOKENS, TOKENS))
    served, bare = [], []
    with running(root, ports) as server:
        engine = LocalFleet(material.base, {task: root / "model_repository" / f"prefill_{task}" / "1"}, kv_tokens=KV_TOKENS, threads=material.threads)
        try:
            prompts = _encode(material.base, requests)
            for turn in range(rounds + 1):
                pair = batch_rate(load.closed(f"{server.host}:{ports.grpc}", requests, BATCH)), batch_rate(decode(engine, requests, prompts))
                if turn:  # the first one warms both up
                    served.append(round(pair[0], 2))
                    bare.append(round(pair[1], 2))
        finally:
            engine.close()
    return {
        "batch": BATCH, "tokens": TOKENS, "threads": material.threads, "server_tokens_per_s": served, "engine_tokens_per_s": bare,
        "server_over_engine": ratio(list(zip(served, bare, strict=True)))}


def decode(fleet: LocalFleet, requests: Sequence[Request], prompts: Sequence[list[int]]) -> list[Sample]:
    """All of the requests at once through an engine of this process: their tokens' times. Raises RuntimeError if one fails."""
    worker = next(iter(fleet.decodes))
    shipments = [fleet.prefill(request.task, ids[:-1]) for request, ids in zip(requests, prompts, strict=True)]
    sent = time.perf_counter()
    times: dict[str, list[float]] = {}
    for i, (request, ids, shipment) in enumerate(zip(requests, prompts, shipments, strict=True)):
        times[str(i)] = []
        fleet.admit(worker, Admit(id=str(i), router=ROUTER, task=request.task, prompt=ids, params=sampling_params(request.sampling)), shipment)
    for step in fleet.listen(worker, ROUTER):
        at = time.perf_counter()
        for event in step.events:
            if event.error is not None:
                raise RuntimeError(f"engine: {event.error}")
            times[event.id].append(at)
    return [Sample(request.task, sent, tuple(times[str(i)])) for i, request in enumerate(requests)]


def _encode(base_dir: Path, requests: Sequence[Request]) -> list[list[int]]:
    prompts = PromptFormat.load(base_dir, BaseManifest.load(base_dir).prompt)
    return [prompts.encode([{"role": "user", "content": request.prompt}]) for request in requests]
