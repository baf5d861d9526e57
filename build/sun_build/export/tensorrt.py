"""TensorRT plans: built from an ONNX file, refitted with another adapter. Written for TensorRT 10 and 11; needs an NVIDIA GPU.

Types are those of the ONNX file (networks are strongly typed, which TensorRT 11 does in any case): bf16 and fp16 are chosen by what
is exported, not by a flag of the builder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from sun.prefill.exported import INPUT
from sun.prefill.tensorrt import missing
from sun_build.export.profiles import Profile


def tensorrt_module() -> ModuleType:
    """The package. Raises RuntimeError saying what is missing."""
    if lack := missing():
        raise RuntimeError(f"format tensorrt: {lack}. An ONNX file needs neither: sun export --format onnx")
    import tensorrt

    return tensorrt


def build_plan(trt: ModuleType, onnx: Path, plan: Path, profiles: list[Profile], refittable: Iterable[str] = (),
               timing_cache: Path | None = None) -> None:
    """Write the plan of an ONNX file.

    refittable: names of the initialisers that `refit_plan` may change later. timing_cache: file of kernels' times, read if it is there and
    written: with it, the next build on this kind of GPU takes a fraction of the time. Raises RuntimeError with TensorRT's reasons.
    """
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        raise RuntimeError(f"TensorRT cannot parse {onnx.name}: {'; '.join(str(parser.get_error(i)) for i in range(parser.num_errors))}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: float32 would be products of 10-bit mantissas
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        profile.set_shape(INPUT, shapes.least, shapes.best, shapes.most)
        config.add_optimization_profile(profile)
    for name in refittable:
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
        if not network.mark_weights_refittable(name):
            raise RuntimeError(f"TensorRT knows no weights {name}")
    if timing_cache is not None:
        config.set_timing_cache(config.create_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b""), False)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise RuntimeError("TensorRT built no plan; its log above says why")
    plan.write_bytes(serialized)
    if timing_cache is not None:
        timing_cache.parent.mkdir(parents=True, exist_ok=True)
        timing_cache.write_bytes(config.get_timing_cache().serialize())


def refit_plan(trt: ModuleType, plan: Path, out: Path, weights: dict[str, Tensor]) -> None:
    """Write a plan with other ``weights``, by initialiser name, contiguous. Raises RuntimeError naming one that does not fit."""
    types = {torch.float32: trt.DataType.FLOAT, torch.float16: trt.DataType.HALF, torch.bfloat16: trt.DataType.BF16}
    logger = trt.Logger(trt.Logger.WARNING)
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise RuntimeError(f"TensorRT {trt.__version__} cannot read {plan}: a plan is for the version and GPU that built it")
    refitter = trt.Refitter(engine, logger)
    there = set(refitter.get_all_weights())
    if other := sorted(there ^ weights.keys()):
        raise RuntimeError(f"{plan} was built for another adapter, which differs in {other[0]} and {len(other) - 1} more: build it anew")
    for name, tensor in weights.items():
        if not refitter.set_named_weights(name, trt.Weights(types[tensor.dtype], tensor.data_ptr(), tensor.numel())):
            raise RuntimeError(f"{plan}: {name} does not fit, an adapter of another rank? Build it anew")
    if not refitter.refit_cuda_engine():
        raise RuntimeError(f"TensorRT did not take the weights; missing are {', '.join(refitter.get_missing_weights()) or 'none'}")
    config = engine.create_serialization_config()
    config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)  # so that it can be refitted again
    out.write_bytes(engine.serialize_with_config(config))
