"""`sun export`: a task's prefill module for ONNX Runtime and TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sun_client.cli_options import RootOption

FORMATS, LORA, EXECUTORS = ("onnx", "tensorrt"), ("merged", "separate"), ("onnx", "triton", "tensorrt")


def export(
    task: Annotated[str, typer.Option(help="A task of the model repository.")],
    format: Annotated[str, typer.Option(help="onnx, or tensorrt: a plan for this machine's GPU, made of the ONNX file.")] = "onnx",
    out: Annotated[Path | None, typer.Option(
        help="A model repository to write the Triton model kv_TASK into, for the onnxruntime or the tensorrt backend.", show_default=False)] = None,
    executor: Annotated[str | None, typer.Option(
        help="Have the task served by the export. onnx: inside its prefill model, on the CPU. triton: prefill calls kv_TASK of the root's repository. "
             "tensorrt: a plan, inside its prefill model, on the GPU of its instance group.",
        show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or, on a GPU, bf16: of linear layers and attention; norms and the KV are float32.")] = "fp32",
    lora: Annotated[str, typer.Option(help="merged into the weights, or separate: initialisers of its own, which a plan can have refitted.")] = "merged",
    opset: Annotated[int, typer.Option(min=18, help="Of ONNX. 18 is read by all; from 23 on attention is one node, if the runtime has it.")] = 18,
    max_batch: Annotated[int, typer.Option(min=1, help="Prompts that run together in Triton.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest prompt that a plan takes.")] = 2048,
    cpu: Annotated[bool, typer.Option("--cpu", help="Triton's onnxruntime backend on the CPU.")] = False,
    refit: Annotated[bool, typer.Option("--refit", help="Give the plan in --out, built with --lora separate, the task's new adapter; no build.")] = False,
    root: RootOption = None,
) -> None:
    """Export a task's prefill module: prompt token ids in, KV out. Checked against torch; the largest error is printed and kept in export.json."""
    from sun_client import show
    from sun_client.root import Root

    for option, value, known in (("--format", format, FORMATS), ("--lora", lora, LORA), ("--executor", executor or "onnx", EXECUTORS)):
        if value not in known:
            raise ValueError(f"{option}: got {value!r}, expected one of {', '.join(known)}")
    place = Root.find(root)
    here = executor in FORMATS
    if here and (out is not None or format != executor or refit):
        raise ValueError(f"--executor: {executor} keeps its file, of --format {executor}, beside the task's weights; --out and --refit are for triton")
    if not here and out is None and executor is None:
        raise ValueError("--out: name a folder for the Triton model, or have the task served by it with --executor")
    if executor == "triton" and out is not None and out.resolve() != place.models:
        raise ValueError(f"--out: executor triton calls a model of {place.models}; leave --out away")
    if dtype == "bf16" and format == "onnx" and (here or cpu):
        raise ValueError("--dtype: ONNX Runtime does not compute bf16 on the CPU, so the export could not be loaded; take fp32 or fp16")
    target = out or place.models
    with show.quiet_libraries(), show.working(f"exporting {task}"):
        from sun_build.config_file import set_parameter, write_whole
        from sun_build.export.entry import Export

        made = Export(place.models, place.base, task, dtype, lora == "merged", opset, max_batch, max_tokens, gpu=not cpu)
        if refit:
            manifest = made.refit(target)
        elif format == "tensorrt":
            manifest = made.plan(None if here else target)
        else:
            manifest = made.onnx_in_task() if here else made.onnx(target)
    folder = made.task_dir if here else target / f"kv_{task}"
    found = manifest.parity
    print(f"{task}: {manifest.format}, {manifest.dtype}, adapter {manifest.lora}, in {folder}.")
    print("Not run here: there is no GPU that torch can use." if found is None else
          f"KV of {found.tokens} tokens in {found.runtime} against torch: largest error {found.max_error:.2g}, largest value {found.largest:.3g}.")
    if not executor:
        return
    prefill = f"prefill_{task}"
    config = place.models / prefill / "config.pbtxt"
    before = config.read_text()
    set_parameter(config, "executor", executor)
    try:
        show.load(place.path, task, *([] if here else [f"kv_{task}"]), prefill)
    except BaseException:
        # A server goes on with what it has loaded; the next start is to find the same.
        write_whole(config, before)
        raise
    print(f"{prefill} has executor {executor}.")
