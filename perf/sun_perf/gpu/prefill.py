"""A prompt's prefill on the device: tokens/s by its length, in one pass and in chunks, and its K and V against the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial

import torch

from sun.decode.cuda.decoder import Decoder
from sun.model.weights import Linear
from sun.prefill.device import DTYPES, DeviceLayer, DeviceModule, LastLayer
from sun.prefill.executor import TorchExecutor
from sun.prefill.jobs import Chunk, Job
from sun_perf.gpu.books import Piece
from sun_perf.gpu.clock import median_ms
from sun_perf.gpu.decode_steps import decoder_of
from sun_perf.gpu.plan import Plan

KV = {"fp32": 1e-4, "bf16": 0.03}
"""Largest root mean square error of K and V, as a share of theirs."""


def module_of(plan: Plan, decoder: Decoder) -> DeviceModule:
    """A prefill module of a bf16 decode module's weights."""
    def linear(group) -> Linear:
        return Linear(group.format.weight, None if group.bias is None else group.bias.to(decoder.dtype))

    def norms(layer) -> tuple:
        return (None, None) if layer.norms is None else tuple(layer.norms)

    layers = [DeviceLayer(linear(of.qkv), linear(of.o), linear(of.gate_up), linear(of.down), of.norm_in, of.norm_mlp, *norms(of)) for of in decoder.layers[:-1]]
    last, queries = decoder.layers[-1], plan.shape.heads * plan.shape.head_dim
    qkv = linear(last.qkv)
    kv = Linear(qkv.weight[queries:], None if qkv.bias is None else qkv.bias[queries:])
    return DeviceModule(plan.shape, decoder.embedding, layers, LastLayer(kv, last.norm_in, norms(last)[1]))


def job_of(executor: TorchExecutor, ids: torch.Tensor) -> Job:
    """A prompt with room for its K and V."""
    shape = executor.model.base
    kv = torch.empty(shape.layers, 2, shape.kv_heads, len(ids), shape.head_dim, device=executor.device, dtype=executor.dtype)
    return Job(ids, Future(), kv=kv)


@torch.inference_mode()
def run(executor: TorchExecutor, job: Job, chunk: int) -> torch.Tensor:
    """A prompt's K and V, from its first token on, in chunks."""
    job.done = 0
    while job.left:
        size = min(chunk, job.left)
        executor.run([Chunk(job, size)])
        job.done += size
    return job.kv


def prefill(plan: Plan) -> Iterator[Piece]:
    """A row a prompt length: ms and tokens/s in one pass and in chunks of the plan's. tflops: of the linear layers alone, 2 a weight and token."""
    executor = TorchExecutor(module_of(plan, decoder_of(plan, "bf16")))
    weights = plan.shape.layers * sum(outputs * inputs for outputs, inputs in plan.shape.linears.values())

    def row(tokens: int) -> Iterator[dict]:
        job = job_of(executor, torch.randint(plan.shape.vocab, (tokens,)))
        whole, chunked = (median_ms(lambda chunk=chunk: run(executor, job, chunk), plan.device, max(1, plan.times // 4)) for chunk in (tokens, plan.chunk))
        yield {
            "scheme": "bf16", "tokens": tokens, "ms": round(whole, 3), "tokens_s": round(tokens / whole * 1e3, 1),
            "tflops": round(2e-9 * weights * tokens / whole, 1), "chunk": plan.chunk, "chunked_ms": round(chunked, 3),
            "chunked_tokens_s": round(tokens / chunked * 1e3, 1)}

    for tokens in plan.prefills:
        yield f"{tokens} tokens", partial(row, tokens)


def errors(plan: Plan, model) -> Iterator[tuple[str, float, float]]:
    """What was compared, the error and its limit: a small float32 model's K and V on the device, in one pass and in chunks, against the CPU's.

    model: a `sun.model.llama.Llama` of the plan's small shape.
    """
    ids, cpu = torch.arange(plan.chunk + 3) * 7 % plan.small.vocab, TorchExecutor(model)
    expected = run(cpu, job_of(cpu, ids), len(ids))
    for scheme, limit in KV.items():
        executor = TorchExecutor(DeviceModule.of_model(model, DTYPES[scheme], plan.device))
        for name, chunk in (("one pass", len(ids)), ("chunks", plan.chunk // 2)):
            got = run(executor, job_of(executor, ids), chunk).float().cpu()
            yield f"{scheme} prefill of {len(ids)} tokens in {name} against plain torch", float((got - expected).norm() / expected.norm()), limit
