"""Conventional serving, SUN and QSUN on one GPU: the same sequences, of several tasks, decoded by each."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial

import torch

from sun.decode.cuda.executor import CudaExecutor
from sun.model.shape import Shape
from sun_perf.gpu.books import Piece
from sun_perf.gpu.clock import median_ms, wait
from sun_perf.gpu.decode_steps import Stepper, decoder_of, pool_of
from sun_perf.gpu.plan import Plan

SPARE = 0.9
"""Of the free memory, what modules and KV pool may take together."""


def weight_bytes(shape: Shape, scheme: str) -> int:
    """Bytes of a module's weights by arithmetic, embedding included. int4: 5 bits a weight and a head of 8; the embedding stays bf16."""
    head, linear = shape.vocab * shape.hidden, shape.layers * sum(outputs * inputs for outputs, inputs in shape.linears.values())
    bits = {"bf16": (16, 16), "int8": (8, 8), "int4": (5, 8)}[scheme]
    return (linear * bits[0] + head * bits[1]) // 8 + 2 * head


def systems(plan: Plan) -> Iterator[Piece]:
    """A row a system and number of tasks.

    conventional: each task has a bf16 module of its own, which decodes its own sequences; modules take turns on the GPU.
    sun: one bf16 module decodes all sequences in one batch; qsun: a low-bit one. Where a task's modules do not all fit,
    conventional's time is that of one module's step times the tasks (measured: false).
    """
    for name, scheme in (("sun", "bf16"), *(("qsun", scheme) for scheme in ("int8", "int4") if scheme in plan.schemes)):
        yield f"{name} {scheme}", partial(together, plan, name, scheme)
    for tasks in plan.tasks:
        yield f"conventional, {tasks} tasks", partial(conventional, plan, tasks)


def together(plan: Plan, name: str, scheme: str) -> Iterator[dict]:
    """One module for all: the same step, whosever sequences they are."""
    stepper, allocated = shared(plan, scheme)
    ms = median_ms(lambda: stepper.step(plan.sequences), plan.device, plan.times)
    for tasks in plan.tasks:
        yield row(plan, name, scheme, tasks, ms, True, 1, allocated)


def row(plan: Plan, name: str, scheme: str, tasks: int, ms: float, measured: bool, modules: int, allocated: float | None) -> dict:
    """ms: until every sequence has its next token."""
    return {
        "system": name, "scheme": scheme, "tasks": tasks, "sequences": plan.sequences, "context": plan.context, "tpot_ms": round(ms, 3),
        "tokens_s": round(plan.sequences / ms * 1e3, 1), "measured": measured, "modules": modules,
        "weights_gb": round(modules * weight_bytes(plan.shape, scheme) / 1e9, 2), "allocated_gb": None if allocated is None else round(allocated, 2)}


def allocated_gb(plan: Plan) -> float:
    """Of the device, by torch."""
    wait(plan.device)
    return torch.cuda.memory_allocated(plan.device) / 1e9 if plan.device.type == "cuda" else 0.0


def shared(plan: Plan, scheme: str) -> tuple[Stepper, float]:
    """One module for all sequences, and the GB that its weights took."""
    before = allocated_gb(plan)
    decoder = decoder_of(plan, scheme)
    taken = allocated_gb(plan) - before
    return Stepper(plan, CudaExecutor(decoder, pool_of(plan, scheme, plan.sequences), plan.sequences)), taken


def conventional(plan: Plan, tasks: int) -> Iterator[dict]:
    """A module a task, in turn, each with its share of the sequences."""
    share = plan.sequences // tasks
    gc.collect()
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for itself is room, too
    kv = plan.shape.kv_bytes(plan.sequences * (plan.context + 1), 2)
    room = torch.cuda.mem_get_info(plan.device)[0] if plan.device.type == "cuda" else 1 << 34
    modules = tasks if tasks * weight_bytes(plan.shape, "bf16") + kv < SPARE * room else 1
    before = allocated_gb(plan)
    decoders = [decoder_of(plan, "bf16", seed) for seed in range(modules)]
    taken = (allocated_gb(plan) - before) if modules == tasks else None
    steppers = [Stepper(plan, CudaExecutor(decoder, pool_of(plan, "bf16", share), share)) for decoder in decoders]

    def round_of_steps() -> None:
        for stepper in steppers:
            stepper.step(share)

    ms = median_ms(round_of_steps, plan.device, plan.times) * tasks / modules
    yield row(plan, "conventional", "bf16", tasks, ms, modules == tasks, tasks, taken)
