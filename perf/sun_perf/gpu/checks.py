"""Kernels and the whole step on this device against plain torch, before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from sun.decode.cuda.attention import Attention
from sun.decode.cuda.decoder import of_model, reference
from sun.decode.cuda.executor import CudaExecutor
from sun.decode.cuda.formats import as_taken
from sun.decode.cuda.sampling import choose
from sun.decode.cuda.table import dtype_of, pack
from sun.decode.executor import TorchExecutor
from sun.decode.kv_pool import KVPool
from sun.model.llama import Llama
from sun.model.codes import symmetric
from sun.model.quantise import FULL, SCHEMES, int4, quantise
from sun.model.shape import Shape
from sun_perf.gpu.books import Piece
from sun_perf.gpu.plan import Plan
from sun_perf.gpu.prefill import errors

LOGITS = {"fp32": 1e-3, "bf16": 0.03, "int8": 0.05, "int4": 0.05, "fp8": 0.15, "bnb-nf4": 0.05}
"""Largest root mean square error of a small model's logits, as a share of their spread."""
LAYERS = {"int8": 1e-5, "int4": 2**-9}
"""Largest error of a layer's output, as a share of what its products could add up to."""
LOW_BIT: dict[str, Callable[[Tensor], Tensor]] = {"int8": lambda weight: symmetric(weight, 127), "int4": int4}
"""Of the schemes with layers of our own: what the codes of a weight stand for."""


def checks(plan: Plan) -> Iterator[Piece]:
    """Results of each check: its name, the error found, its limit, whether it passed. A limit of None is for information."""
    for scheme, numbers in LOW_BIT.items():
        if scheme in plan.schemes:
            yield f"{scheme} layer", partial(layer, plan, scheme, numbers)
    yield "attention", partial(attention, plan)
    for scheme in ("fp32", *plan.schemes):
        yield f"{scheme} step", partial(steps, plan, scheme)
    yield "prefill", lambda: (result(*each) for each in errors(plan, small_model(plan.small, FULL)))
    yield "sampling", partial(sampling, plan)


def result(name: str, error: float, limit: float | None) -> dict:
    """One check's. An error that is no number passes nothing, and is None."""
    known = math.isfinite(error)
    return {"check": name, "error": float(f"{error:.3g}") if known else None, "limit": limit, "passed": known and (limit is None or error <= limit)}


def layer(plan: Plan, scheme: str, numbers: Callable[[Tensor], Tensor]) -> Iterator[dict]:
    """A low-bit layer of the timed shape against the ``numbers`` that its codes stand for."""
    outputs, inputs = plan.shape.linears["qkv"]
    weight = torch.randn(outputs, inputs, device=plan.device) * inputs**-0.5
    packed, numbers = pack(weight, scheme, torch.bfloat16), numbers(weight).double()
    for rows in plan.layer_rows:
        x = torch.randn(rows, inputs, device=plan.device, dtype=torch.bfloat16)
        most = x.double().abs() @ numbers.abs().T
        error = ((packed(as_taken(x, packed)).double().sum(0) - x.double() @ numbers.T).abs() / most).max()
        yield result(f"{scheme} layer {outputs} x {inputs}, {rows} rows", float(error), LAYERS[scheme])


def attention(plan: Plan) -> Iterator[dict]:
    """Ragged lengths in one pool against torch's attention, row by row."""
    shape, lengths = plan.shape, [1, 2, 63, 64, 65, 511, plan.shape.max_context % 5000][: 7 if plan.device.type == "cuda" else 3]
    kv = torch.randn(2, shape.kv_heads, sum(lengths), shape.head_dim, device=plan.device, dtype=torch.bfloat16)
    starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))], device=plan.device)
    q = torch.randn(len(lengths), shape.heads, shape.head_dim, device=plan.device, dtype=torch.bfloat16)
    run = Attention(shape.heads, shape.kv_heads, shape.head_dim, len(lengths), sum(lengths), plan.device)
    got = run(q, kv, starts, torch.tensor(lengths, device=plan.device) - 1)
    wide = kv.float().repeat_interleave(shape.heads // shape.kv_heads, dim=1)
    rows = [F.scaled_dot_product_attention(q[i, :, None].float(), *wide[:, :, a : a + n]) for i, (a, n) in enumerate(zip(starts.tolist(), lengths, strict=True))]
    yield result(f"attention over {lengths} tokens", float((got.float() - torch.stack(rows).flatten(1)).abs().max()), 0.03)


def random_tensors(shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint's tensors in float32, wide enough that answers differ from token to token."""
    torch.manual_seed(seed)
    heads, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {
        "self_attn.q_proj": (heads, shape.hidden), "self_attn.k_proj": (keys, shape.hidden), "self_attn.v_proj": (keys, shape.hidden),
        "self_attn.o_proj": (shape.hidden, heads), "mlp.gate_proj": (shape.inner, shape.hidden), "mlp.up_proj": (shape.inner, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.inner)}
    norms = {"input_layernorm": shape.hidden, "post_attention_layernorm": shape.hidden}
    norms |= {"self_attn.q_norm": shape.head_dim, "self_attn.k_norm": shape.head_dim} if shape.normed else {}
    made = {"model.embed_tokens.weight": torch.randn(shape.vocab, shape.hidden), "model.norm.weight": 1 + 0.3 * torch.randn(shape.hidden)}
    made["lm_head.weight"] = torch.randn(shape.vocab, shape.hidden) * shape.hidden**-0.5
    biased = [name for name in sizes if name[-6:] in ("q_proj", "k_proj", "v_proj")] if shape.biases else []
    for layer in range(shape.layers):
        made |= {f"model.layers.{layer}.{name}.weight": torch.randn(*size) * size[1] ** -0.5 for name, size in sizes.items()}
        made |= {f"model.layers.{layer}.{name}.bias": torch.randn(sizes[name][0]) for name in biased}
        made |= {f"model.layers.{layer}.{name}.weight": 1 + 0.3 * torch.randn(size) for name, size in norms.items()}
    return made


def small_model(shape: Shape, scheme: str) -> Llama:
    """A random model as ``scheme``'s reference has it; int8 with inputs as they come, so without calibration."""
    kind, tensors = reference(scheme), random_tensors(shape)
    if kind == "int8":
        tensors = {name: symmetric(t, 127) if t.ndim == 2 and "embed" not in name else t for name, t in tensors.items()}
        kind = FULL
    return Llama(shape, quantise(tensors, kind) if kind in SCHEMES else tensors, scheme=kind)


def steps(plan: Plan, scheme: str) -> Iterator[dict]:
    """Logits of a small random model against plain torch's on the CPU; on a GPU also with graphs and without, and in batches of two sizes."""
    shape, dtype, contexts = plan.small, dtype_of(scheme), (1, 9, 70, 33, 5)[: 5 if plan.device.type == "cuda" else 2]
    model = small_model(shape, scheme)
    pools = [KVPool(shape, 300, "cpu"), *(KVPool(shape, 300, plan.device, dtype, spare=1) for _ in range(2))]
    noise = torch.randn(*pools[0].data.shape)
    for pool in pools:
        pool.data[:, :, :, :300].copy_(noise)
    decoder = of_model(model, scheme, dtype, plan.device)
    executor = CudaExecutor(decoder, pools[1], 8)
    slots = [pools[0].take(context + 4) for context in contexts]

    def run(executor, rows: range, step: int) -> Tensor:
        return executor.step([(7 * r + step) % shape.vocab for r in rows], [contexts[r] - 1 + step for r in rows], [slots[r] for r in rows]).cpu().clone()

    def both(executor) -> Tensor:
        return torch.stack([run(executor, range(len(contexts)), step) for step in range(2)])

    got, expected = both(executor), both(TorchExecutor(model, pools[0]))
    yield result(f"{scheme} step against plain torch", float((got - expected).pow(2).mean().sqrt() / expected.std()), LOGITS[scheme])
    if plan.device.type != "cuda":
        return
    eager = both(CudaExecutor(decoder, pools[2], 8, graphs=False))
    # Ours give the same bits each time; of bitsandbytes' nobody says so.
    yield result(f"{scheme} step with graphs against without", float((got - eager).abs().max()), None if scheme == "bnb-nf4" else 0.0)
    fewer = run(executor, range(1, len(contexts)), 1)
    yield result(f"{scheme} rows in a batch of half the size", float((fewer - got[1, 1:]).abs().max()), None)


def sampling(plan: Plan) -> Iterator[dict]:
    """Share of tokens drawn on the device that differ from the CPU's for the same logits."""
    vocab, wrong, count = plan.shape.vocab, 0, 0
    kinds = ({}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.1, "temperature": 0.7}, {"top_k": 5, "top_p": 0.8})
    # All different: which of two equal ones comes first is each side's own.
    logits = torch.stack([torch.randperm(vocab) for _ in kinds]) * (12.0 / vocab)
    for seed in range(20):
        params = [SimpleNamespace(**{
            "temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "logprobs": None, "penalised": False, "seed": seed, **kind}) for kind in kinds]
        rows = [SimpleNamespace(admit=SimpleNamespace(params=each, prompt=[0]), generated=[], position=seed, banned=list) for each in params]
        # By the same code there: a worker's own draw needs numba, and tests hold this one to it.
        wrong += sum(ours != theirs for ours, theirs in zip(choose(logits.to(plan.device), rows), choose(logits, rows), strict=True))
        count += len(kinds)
    yield result(f"{count} tokens drawn on the device and on the CPU", wrong / count, 0.0)
