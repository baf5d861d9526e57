"""What a Triton model of ours is told: its place in the repository and the parameters of its config.pbtxt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from sun.cores import run_on

S = TypeVar("S", bound=msgspec.Struct)
ON_GPU = ("cuda", "tensorrt")
"""Executors, of decode or prefill, that need an instance group of KIND_GPU; others need one of KIND_CPU."""


def check_numpy(version: str = np.__version__) -> None:
    """Raise RuntimeError under numpy 2: the Python stub of Triton 24.10 then corrupts tensors without an error."""
    if int(version.split(".")[0]) >= 2:
        raise RuntimeError(
            f"numpy {version} silently corrupts tensors in this Triton's Python stub; run `pip install \"numpy<2\"` in the environment "
            "that tritonserver uses, and start again")


class Place:
    """Where a model lies. args: what Triton passes to ``initialize``.

    The base model is `../build/base` beside the model repository.
    """

    def __init__(self, args: dict[str, str]):
        check_numpy()
        self.name = args["model_name"]
        self.repository = Path(args["model_repository"]).parent
        self.version_dir = self.repository / self.name / args["model_version"]
        self.base_dir = base_dir(self.repository)
        self._kind, self._device = args.get("model_instance_kind", "CPU"), args.get("model_instance_device_id", "0")
        config = json.loads(args["model_config"])
        self._parameters, self._groups = config.get("parameters", {}), config.get("instance_group", [])

    def settings(self, kind: type[S]) -> S:
        """The parameters as ``kind``. Raises ValueError naming one that is unknown or out of its limits.

        Triton's own parameters, written in capitals (EXECUTION_ENV_PATH), are left to Triton.
        """
        values: dict[str, Any] = {key: value["string_value"] for key, value in self._parameters.items() if not key.isupper()}
        try:
            return msgspec.convert(values, kind, strict=False)
        except msgspec.ValidationError as error:
            raise ValueError(f"config.pbtxt of {self.name}: parameters: {error}; known are {', '.join(kind.__struct_fields__)}") from error

    def device(self, executor: str) -> str | None:
        """The GPU that Triton gave this instance ("cuda:0"), None for one on the CPU.

        Raises ValueError if the executor needs the other kind of instance group.
        """
        if (self._kind == "GPU") != (executor in ON_GPU):
            needed = "KIND_GPU" if executor in ON_GPU else "KIND_CPU"
            raise ValueError(f"config.pbtxt of {self.name}: parameters: executor is {executor!r}, which needs instance_group kind {needed}, not KIND_{self._kind}")
        return f"cuda:{self._device}" if self._kind == "GPU" else None

    def only_one(self, why: str) -> None:
        """Raise ValueError naming the field if Triton starts this model more than once: ``count`` times on each of ``gpus``, by default all there are."""
        def check(field: str, got: int) -> None:
            if got != 1:
                raise ValueError(f"config.pbtxt of {self.name}: instance_group: {field}: {got}, must be 1: {why}")

        check("groups", len(self._groups) or 1)
        for group in self._groups:
            check("count", int(group.get("count") or 1))
            check("gpus", len(group.get("gpus") or ()) if group.get("kind") == "KIND_GPU" else 1)

    def folder(self, parameter: str, path: str) -> Path | None:
        """The folder that a parameter names, absolute or from the repository's parent; None for the empty string.

        Raises ValueError naming the parameter if there is no such folder.
        """
        if not path:
            return None
        folder = self.repository.parent / path
        if not folder.is_dir():
            raise ValueError(f"config.pbtxt of {self.name}: parameters: {parameter} is {path!r}, but {folder} is no folder")
        return folder

    def run_on(self, cores: str, threads: int, nice: int = 0) -> None:
        """See `sun.cores.run_on`. Raises ValueError naming the parameter."""
        try:
            run_on(cores, threads, nice)
        except ValueError as error:
            raise ValueError(f"config.pbtxt of {self.name}: parameters: {error}") from error


def base_dir(repository: Path) -> Path:
    """The base model that a model repository's tasks and workers share."""
    return repository.parent / "build" / "base"
