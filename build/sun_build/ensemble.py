"""The ensemble of a task: tokenize -> prefill_<task> -> sun."""

from __future__ import annotations

from sun.router.request import INPUTS, OUTPUTS

OWN = ("task", "ticket", "prompt_ids")
"""Inputs of `sun` that an ensemble fills itself."""


def ensemble_config(name: str, whole_prompt: bool = False) -> str:
    """`config.pbtxt` of the ensemble of task ``name``: `sun`'s inputs less the task, and its outputs. whole_prompt: see `TaskManifest`."""
    inputs = [name for name in INPUTS if name not in OWN]
    tensors = ",\n".join(f'  {{ name: "{i}", data_type: {INPUTS[i]}, dims: [-1], optional: true }}' for i in inputs)
    outputs = ",\n".join(f'  {{ name: "{o}", data_type: {kind}, dims: [-1] }}' for o, kind in OUTPUTS.items())
    prefilled = "prompt_ids" if whole_prompt else "input_ids"  # no other: Triton refuses an ensemble with a tensor that no step takes
    steps = ",\n".join((
        _step("tokenize", {"text_input": "text_input", "messages": "messages"}, {o: o for o in dict.fromkeys(("prompt_ids", prefilled))}),
        _step(f"prefill_{name}", {"input_ids": prefilled}, {"ticket": "ticket"}),
        _step("sun", {i: i for i in (*inputs, "ticket", "prompt_ids")}, {o: o for o in OUTPUTS}),
    ))
    return f"""\
# {name}: text in, text out, as `sun` with task "{name}", step by step. Written by `sun task add`.
platform: "ensemble"
input [
{tensors}
]
output [
{outputs}
]
ensemble_scheduling {{
  step [
{steps}
  ]
}}
"""


def _step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
    maps = [f'      input_map {{ key: "{k}" value: "{v}" }}' for k, v in inputs.items()]
    maps += [f'      output_map {{ key: "{k}" value: "{v}" }}' for k, v in outputs.items()]
    return "\n".join([f'    {{\n      model_name: "{model}"\n      model_version: -1', *maps, "    }"])
