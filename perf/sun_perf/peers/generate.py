"""transformers' `generate` in left-padded batches, as a worker process: a line of JSON in, a line out.

`separate`: a model a task with its adapter merged in, the tasks' batches one after the other. `mixed`: one model with all adapters,
one batch of all tasks, peft applying to each row its own. `continuous`: as separate, by transformers' continuous batching.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

MODES = ("separate", "mixed", "continuous")
BASE = "__base__"
"""peft's name for no adapter."""
PAGE, BATCH_TOKENS = 64, 512
"""Of continuous batching: tokens of a page of its cache, tokens of a pass."""
Row = tuple[str, list[int]]
"""A task and a prompt's token ids."""


def make(mode: str, base: Path, adapters: dict[str, Path | None]) -> Callable[[list[Row], int], list[list[int]]]:
    """Load what a mode needs; gives answer(rows, tokens) -> ``tokens`` greedy token ids a row, whatever they are (no end of sequence).

    adapters: task -> its LoRA adapter, None for the base as it is. Raises ValueError for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
    if mode == "mixed":
        model = _base(base)
        for task, adapter in adapters.items():
            if isinstance(model, PeftModel) and adapter is not None:
                model.load_adapter(adapter, task)
            elif adapter is not None:
                model = PeftModel.from_pretrained(model, adapter, task)
        names = {task: task if adapter else BASE for task, adapter in adapters.items()}
        return lambda rows, tokens: batch(model, [ids for _, ids in rows], tokens, adapter_names=[names[task] for task, _ in rows])
    models = {task: _base(base) if adapter is None else PeftModel.from_pretrained(_base(base), adapter).merge_and_unload()
              for task, adapter in adapters.items()}
    run = batch if mode == "separate" else continuous

    def answer(rows: list[Row], tokens: int) -> list[list[int]]:
        made: list[list[int]] = [[] for _ in rows]
        for task, model in models.items():
            places = [i for i, (name, _) in enumerate(rows) if name == task]
            if places:
                for i, answered in zip(places, run(model, [rows[i][1] for i in places], tokens), strict=True):
                    made[i] = answered
        return made

    return answer


@torch.inference_mode()
def batch(model, prompts: list[list[int]], tokens: int, **more) -> list[list[int]]:
    """One `generate` call for all prompts, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=_greedy(tokens), **more)
    return out[:, longest:].tolist()


def continuous(model, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """transformers' own continuous batching over a paged cache."""
    # Left alone it would take nearly all of the machine's memory for its cache, and fill it with zeros, at each call.
    pages = sum(-(-(len(prompt) + tokens) // PAGE) for prompt in prompts)
    settings = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages + len(prompts), max_batch_tokens=max(BATCH_TOKENS, len(prompts)))
    outputs = model.generate_batch(prompts, _greedy(tokens), settings, warmup=False)
    return [list(output.generated_tokens) for output in outputs.values()]


def _base(base: Path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None  # else it is taken where a call's own is None
    return model


def _greedy(tokens: int) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0)


def main() -> None:
    """Say "ready", then answer {"rows": [[task, ids], ...], "tokens": n} with the number of tokens of each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", required=True, choices=MODES)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--task", action="append", nargs=2, default=[], metavar=("NAME", "ADAPTER"), help="adapter '' is the base as it is")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    answer = make(args.mode, args.base, {name: Path(adapter) if adapter else None for name, adapter in args.task})
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        # What a library prints must not come between the lines.
        with redirect_stdout(sys.stderr):
            made = answer([(task, ids) for task, ids in asked["rows"]], asked["tokens"])
        print(json.dumps([len(row) for row in made]), flush=True)


if __name__ == "__main__":
    main()
