"""The two-module loss: the prompt through the task's prefill module, the response through the frozen decode module."""

from __future__ import annotations

from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sun_build.tune.data import Example

IGNORE = -100
"""The label of a position without a loss, as in `torch.nn.functional.cross_entropy`."""


def collate(batch: list[Example], whole_prompt: bool = False) -> dict[str, Tensor]:
    """Lay a batch out for the handoff.

    What all prompts begin with (a system prompt, a tool's description) is taken out, to run once: shared_ids [S].
    The prompts' rest up to x(n-1), or with ``whole_prompt`` to xn, is padded on the left, the decode inputs xn, y1..y(m-1), or y1..y(m-1), on the right.
    Returns int64 tensors: shared_ids [S]; prefill_ids, prefill_positions [B, P]; decode_ids, decode_positions [B, D], where D is R or R - 1;
    mask [B, S + P + D] (1 where a token may be attended to); labels [B, R] (`IGNORE` where there is no loss).
    """
    prompts = [e.prompt if whole_prompt else e.prompt[:-1] for e in batch]
    # All before xn, whose state is wanted of each prompt.
    shared = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*(e.prompt[:-1] for e in batch), strict=False))))
    width = max(len(p) for p in prompts) - shared
    length = max(len(e.response) for e in batch)
    rows: dict[str, list[list[int]]] = {name: [] for name in (
        "prefill_ids", "prefill_positions", "decode_ids", "decode_positions", "mask", "labels")}
    for e, prompt in zip(batch, prompts, strict=True):
        inputs = e.response[:-1] if whole_prompt else [e.prompt[-1], *e.response[:-1]]
        n, m = len(prompt), len(inputs)
        left, right = width - (n - shared), length - len(e.response)
        rows["prefill_ids"].append([0] * left + prompt[shared:])
        rows["prefill_positions"].append([0] * left + list(range(shared, n)))
        rows["decode_ids"].append(inputs + [0] * right)
        rows["decode_positions"].append(list(range(n, n + m)) + [0] * right)
        rows["mask"].append([1] * shared + [0] * left + [1] * (n - shared + m) + [0] * right)
        rows["labels"].append(e.response + [IGNORE] * right)
    return {"shared_ids": torch.tensor(prompts[0][:shared], dtype=torch.int64)} | {
        name: torch.tensor(values, dtype=torch.int64) for name, values in rows.items()}


def handoff_logits(prefill: nn.Module, decode: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits [B, R, vocab] of the response tokens, exactly at serving's boundary (SUN, arXiv 2603.02599).

    prefill, decode: causal LMs as transformers' `AutoModelForCausalLM` gives them, peft's wrapper on or not. Gradients
    reach the prefill module through its K and V alone, and where it runs all of the prompt (see `collate`) through the last state, from which the
    decode module's head makes the first token's logits. With one model for both, this is ordinary fine-tuning.
    """
    shared, width = len(batch["shared_ids"]), batch["prefill_ids"].shape[1]
    cache = first = None
    if shared:
        cache = prefill.get_decoder()(input_ids=batch["shared_ids"][None], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(batch["mask"]))
    if width:
        out = prefill.get_decoder()(
            input_ids=batch["prefill_ids"], attention_mask=batch["mask"][:, : shared + width],
            position_ids=batch["prefill_positions"], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        if batch["decode_ids"].shape[1] < batch["labels"].shape[1]:
            # Behind the prefill module's own final norm: it is the base's, and does not learn.
            first = decode.get_output_embeddings()(out.last_hidden_state[:, -1:])
    if not batch["decode_ids"].shape[1]:
        return first
    logits = decode(
        input_ids=batch["decode_ids"], attention_mask=batch["mask"], position_ids=batch["decode_positions"],
        past_key_values=cache, use_cache=True,
    ).logits
    return logits if first is None else torch.cat((first, logits), dim=1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in float32, summed over the response tokens."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def distillation(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(teacher || student) at temperature 1, summed over the response tokens (Hinton et al., arXiv 1503.02531)."""
    real = labels != IGNORE
    student, target = logits[real].float().log_softmax(-1), teacher[real].float().log_softmax(-1)
    return F.kl_div(student, target, reduction="sum", log_target=True)
