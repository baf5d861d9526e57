"""Random models of two layers (one of six) with a byte-level tokeniser, and what plain transformers makes of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, Qwen2Config,
    Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
)

from sun.model.loading import task_digest, task_files
from sun.model.manifest import BaseManifest, TaskManifest, write_manifest

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|pad|>")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
EOS = len(BYTES) + 1
VOCAB = 300
CONTEXT = 512
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('tools are not spoken here') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
SIZE = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "eos_token_id": EOS, "bos_token_id": None, "pad_token_id": None,
    # Wide enough that answers differ from prompt to prompt and from weights to weights.
    "initializer_range": 0.25,
}
WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""A shape that every number format's kernels take."""
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True)),
    "deep": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZE, "num_hidden_layers": 6}, tie_word_embeddings=True)),  # has layers that are not at an end
    "wide": lambda: LlamaForCausalLM(LlamaConfig(**SIZE | WIDE, tie_word_embeddings=True)),
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=False, rope_parameters=LLAMA3)),
    "yarn": lambda: LlamaForCausalLM(LlamaConfig(**SIZE, tie_word_embeddings=True, rope_parameters=YARN)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZE, tie_word_embeddings=False)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZE, head_dim=16, tie_word_embeddings=True)),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: token id = rank of the byte's letter, then the special tokens."""
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(BYTES)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(SPECIALS))
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=SPECIALS[1], pad_token=SPECIALS[2])
    fast.chat_template = TEMPLATE
    return fast


def checkpoint(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """A Hugging Face checkpoint directory of a random model of ``kind``."""
    torch.manual_seed(seed)
    model = KINDS[kind]()
    with torch.no_grad():  # transformers starts biases at 0 and norms at 1, which would hide whether they are used
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def adapter(folder: Path, base_dir: Path, seed: int = 1, **settings) -> Path:
    """A random LoRA adapter of all linear layers, saved by peft."""
    from peft import LoraConfig, get_peft_model  # seconds, and not every file needs it

    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **settings})
    get_peft_model(load(base_dir), config).save_pretrained(folder)
    return folder


def task(repository: Path, base_dir: Path, name: str, kind: str = "identity", weights: Path | None = None,
         sampling: dict | None = None, whole_prompt: bool = False) -> Path:
    """`prefill_<name>/1` of a model repository; the folder."""
    base, folder = BaseManifest.load(base_dir), repository / f"prefill_{name}" / "1"
    folder.mkdir(parents=True)
    for file in task_files(weights or base_dir, kind):
        shutil.copyfile(file, folder / file.name)
    write_manifest(folder, TaskManifest(
        name=name, weights=kind, weights_digest=task_digest(folder, kind), base_digest=base.digest, prompt=base.prompt,
        sampling=sampling or {}, whole_prompt=whole_prompt))
    return folder


def load(folder: Path):
    """A checkpoint directory as a plain transformers model."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_adapter(base_dir: Path, folder: Path):
    """The base with an adapter on it, by peft."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load(base_dir), folder).eval()


@torch.no_grad()
def reference(prefill, decode, prompt: list[int], count: int) -> list[int]:
    """``count`` greedy tokens after x1..xn by plain transformers: prefill model on x1..x(n-1), decode model on the rest."""
    cache = prefill(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values if len(prompt) > 1 else None
    tokens = [prompt[-1]]
    for _ in range(count):
        out = decode(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens[1:]


@torch.no_grad()
def reference_whole(prefill, decode, prompt: list[int], count: int) -> list[int]:
    """The same where the prefill model runs xn, too: the decode model's norm and head choose the first token from its last state."""
    states = []
    hook = prefill.get_decoder().norm.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    cache = prefill(torch.tensor([prompt]), use_cache=True).past_key_values
    hook.remove()
    tokens = [int(decode.lm_head(decode.get_decoder().norm(states[0]))[0, -1].argmax())]
    for _ in range(count - 1):
        out = decode(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens
