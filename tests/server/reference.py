"""What the answers must be: plain transformers, a task's prefill model on x1..x(n-1), or on all of a prompt, the base model on the rest."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


class Reference:
    """One task in float32. adapter: its folder, whose task.json says whether the prefill model runs xn, too; None for the base's own weights."""

    def __init__(self, base_dir: Path, adapter: Path | None = None):
        self.tokenizer = AutoTokenizer.from_pretrained(base_dir)
        self.decode = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        prefill = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        self.prefill = PeftModel.from_pretrained(prefill, adapter) if adapter else prefill
        self.whole_prompt = adapter is not None and json.loads((adapter / "task.json").read_text()).get("whole_prompt", False)

    def prompt(self, text: str) -> torch.Tensor:
        """Token ids [1, n] of a user message."""
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    @torch.inference_mode()
    def short_of(self, text: str, tokens: list[int]) -> list[float]:
        """How far each of an answer's tokens' logit lies below the best one's, given the tokens before it: all 0 for the greedy answer.

        One pass over them all, which takes a tenth of decoding them one by one.
        """
        ids = self.prompt(text)
        sampled = torch.tensor([tokens[:-1]], dtype=ids.dtype)
        prefilled = self.prefill.get_decoder()(ids if self.whole_prompt else ids[:, :-1], use_cache=True)
        run = sampled if self.whole_prompt else torch.cat((ids[:, -1:], sampled), dim=1)
        logits = self.decode(run, past_key_values=prefilled.past_key_values, use_cache=True).logits[0]
        if self.whole_prompt:
            logits = torch.cat((self.decode.get_output_embeddings()(prefilled.last_hidden_state[0, -1:]), logits))
        return (logits.amax(dim=-1) - logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)).tolist()
