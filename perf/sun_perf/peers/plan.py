"""Which ways of serving are compared, and with which decode scheme of ours each: like with like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sun_perf.peers.batched import Batched
from sun_perf.peers.llama import Llama
from sun_perf.peers.system import Place, System
from sun_perf.peers.vllm import Vllm


@dataclass(frozen=True)
class Variant:
    """A peer in one of the ways that it can serve several tasks.

    scheme: of our decode module beside it. reference: not the same service (one model for all tasks), so no peer's ratio counts it.
    """

    name: str
    title: str
    peer: str
    scheme: str
    make: Callable[[Place], System]
    reference: bool = False


def _llama(mode: str, precision: str, scheme: str) -> Variant:
    title = {"models": "a model a task", "lora": "adapters", "one": "one model for all"}[mode]
    return Variant(
        f"llama-{mode}-{precision}", f"llama.cpp {precision}, {title}", "llama", scheme, lambda place: Llama(place, mode, precision), mode == "one")


def _batched(mode: str) -> Variant:
    title = {"separate": "a batch a task", "mixed": "mixed adapters in a batch", "continuous": "continuous batching"}[mode]
    return Variant(f"transformers-{mode}", f"transformers fp32, {title}", "transformers", "fp32", lambda place: Batched(place, mode))


VARIANTS = {variant.name: variant for variant in (
    *(_llama(mode, precision, scheme)
      for precision, scheme in (("f32", "fp32"), ("f16", "fp32"), ("q8_0", "int8"), ("q4_1", "int4")) for mode in ("models", "lora", "one")),
    Variant("vllm-lora", "vLLM fp32, adapters", "vllm", "fp32", Vllm),
    _batched("separate"), _batched("mixed"), _batched("continuous"),
)}


def chosen(peers: list[str], names: list[str] | None) -> list[Variant]:
    """The variants of some peers, or the named ones, those of one scheme together. Raises ValueError for an unknown name."""
    if unknown := [name for name in names or [] if name not in VARIANTS]:
        raise ValueError(f"variants: {', '.join(unknown)} unknown; known are {', '.join(VARIANTS)}")
    found = [variant for variant in VARIANTS.values() if (variant.name in names if names else variant.peer in peers)]
    schemes = list(dict.fromkeys(variant.scheme for variant in VARIANTS.values()))
    return sorted(found, key=lambda variant: schemes.index(variant.scheme))
