"""Whether this machine and installation can serve, check by check, and what to do where not."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sun.memory import GIB, available
from sun_client.root import Root
from sun_client.server import Ports


@dataclass(frozen=True)
class Finding:
    """ok, warning (it serves, but less well) or error (it does not serve); what was seen, and what to do."""

    check: str
    state: str
    seen: str
    advice: str = ""


@dataclass
class Doctor:
    """Runs the checks on a root; ports: those that a server is to have."""

    root: Root
    ports: Ports = field(default_factory=Ports)
    host: str = "127.0.0.1"

    @property
    def checks(self) -> list[Callable[[], Iterator[Finding]]]:
        """All checks, in the order of what needs what."""
        return [self.python, self.triton, self.base, self.tasks, self.shared_memory, self.memory, self.listening, self.processor, self.formats, self.prefill, self.exports, self.gpu]

    def run(self) -> Iterator[Finding]:
        """Findings as they come; a check that fails itself is one."""
        for check in self.checks:
            try:
                yield from check()
            except Exception as error:  # the next check may tell why
                yield Finding(check.__name__.replace("_", " "), "error", f"{type(error).__name__}: {error}", "run `sun setup`")

    def python(self) -> Iterator[Finding]:
        """Python and the packages whose versions matter."""
        import numpy
        import torch
        import transformers

        from sun.settings import check_numpy

        yield Finding("python", "ok", f"{sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}")
        try:
            check_numpy()
        except RuntimeError as error:
            yield Finding("numpy", "error", numpy.__version__, str(error))
        else:
            yield Finding("numpy", "ok", numpy.__version__)

    def triton(self) -> Iterator[Finding]:
        """The server's binary and the backends' stub."""
        binary, stub = Path(sys.prefix) / "bin" / "tritonserver", self.root.path / "backends" / "python" / "triton_python_backend_stub"
        for name, path in (("tritonserver", binary), ("Python stub", stub)):
            there = os.access(path, os.X_OK)
            yield Finding(name, "ok" if there else "error", str(path) if there else f"{path} is missing", "" if there else "run `sun setup`")

    def base(self) -> Iterator[Finding]:
        """The base model's files are those that its manifest names."""
        from sun_build.base import checkpoint_digest

        manifest = self.root.manifest()
        same = checkpoint_digest(self.root.base) == manifest.digest
        yield Finding("base", "ok" if same else "error", f"{manifest.source} {manifest.digest[:19]}",
                      "" if same else "its weights are not those that its manifest names: run `sun base` again")

    def tasks(self) -> Iterator[Finding]:
        """Every task's weights are those of its manifest, and of this base."""
        from sun.model.loading import task_digest
        from sun.router.tasks import TaskRegistry

        digest, registry = self.root.manifest().digest, TaskRegistry(self.root.models)
        if not registry.names():
            yield Finding("tasks", "warning", "none", "`sun task add` makes one")
        for task in map(registry.get, registry.names()):
            folder = self.root.models / f"prefill_{task.name}" / "1"
            if task.base_digest != digest:
                yield Finding(f"task {task.name}", "error", f"was made for base {task.base_digest[:19]}", "tune it for this base, or `sun task remove` it")
            elif task.weights != "identity" and task_digest(folder, task.weights) != task.weights_digest:
                yield Finding(f"task {task.name}", "error", "its weights are not those that its manifest names", "`sun task add` it again")
            else:
                yield Finding(f"task {task.name}", "ok", f"{task.weights} {task.weights_digest[:19]}")

    def shared_memory(self) -> Iterator[Finding]:
        """Room in /dev/shm for the KV on its way and for Triton's own regions."""
        from sun.handoff.shm import default_root, room

        geometry, folder = self.root.manifest().geometry, default_root()
        place = next(path for path in (folder, *folder.parents) if path.exists())
        (free, _), token = room(place), geometry.kv_bytes(1, 4)
        tokens = free // token
        need = 16 * 1024  # sixteen prompts of a thousand tokens on their way at once
        advice = f"prompts on their way need {token / 1024:.0f} KiB a token: mount /dev/shm larger (docker --shm-size), or set SUN_SHM"
        yield Finding("shared memory", "ok" if tokens >= need else "warning", f"{free / GIB:.1f} GiB free for KV at {place}, {tokens} tokens of KV",
                      "" if tokens >= need else advice)

    def memory(self) -> Iterator[Finding]:
        """Room for the workers' weights and KV pools."""
        from sun.model.weights import map_checkpoint
        from sun.slots import KV_TOKENS
        from sun_build.config_file import parameter

        workers = [path for path in self.root.models.glob("decode_*") if path.is_dir()]
        weights = 4 * sum(tensor.numel() for tensor in map_checkpoint(self.root.base).values())  # float32, whatever they are on disk
        tokens = sum(int(parameter(self.root.models, worker.name, "kv_tokens") or KV_TOKENS) for worker in workers)
        need = len(workers) * 2 * weights + self.root.manifest().geometry.kv_bytes(tokens, 4)
        free = available()
        yield Finding("memory", "ok" if free >= need else "warning", f"{free / GIB:.1f} GiB free, {len(workers)} decode workers may need {need / GIB:.1f}",
                      "" if free >= need else "fewer workers, a smaller kv_tokens, or `sun quantize --apply`")

    def listening(self) -> Iterator[Finding]:
        """The ports are free, or a server of this root has them."""
        from sun_client.control import Control

        ours = {control.http_port for control in Control.running(self.root.path)}
        for name, port in vars(self.ports).items():
            with socket.socket() as probe:
                taken = probe.connect_ex((self.host, port)) == 0
            if taken and self.ports.http in ours:
                yield Finding(f"{name} port", "ok", f"{port}: a server of this root answers")
            else:
                yield Finding(f"{name} port", "warning" if taken else "ok", f"{port}: {'another process has it' if taken else 'free'}",
                              f"choose another with --{name}-port" if taken else "")

    def processor(self) -> Iterator[Finding]:
        """What the kernels need."""
        from torch.backends.cpu import get_cpu_capability

        capability, cores = get_cpu_capability(), len(os.sched_getaffinity(0))
        yield Finding("CPU", "ok" if capability != "DEFAULT" else "warning", f"{cores} cores, {capability}",
                      "" if capability != "DEFAULT" else "without AVX2 or better, decoding is several times slower")

    def formats(self) -> Iterator[Finding]:
        """Which executors and decode formats run here. The CPU's are needed; a GPU's are for who has one."""
        from sun.decode.executors import EXECUTORS, formats, why_not

        for executor in EXECUTORS:
            if reason := why_not(executor):
                yield Finding(f"executor {executor}", "ok", f"does not run here: {reason}")
                continue
            yield Finding(f"executor {executor}", "ok", "runs here")
            for scheme, missing in formats(executor).items():
                if missing:
                    yield Finding(f"{executor} format {scheme}", "warning" if executor == "cpu" else "ok", f"does not run here: {missing}", "use another scheme")
                else:
                    yield Finding(f"{executor} format {scheme}", "ok", "runs here")

    def prefill(self) -> Iterator[Finding]:
        """Which prefill executors run here, and which ways KV has to a decode worker."""
        from sun.handoff import transports
        from sun.prefill import executors

        for kind, names, why_not in (("prefill executor", executors.EXECUTORS, executors.why_not), ("transport", transports.TRANSPORTS, transports.why_not)):
            for name in names:
                reason = why_not(name)
                yield Finding(f"{kind} {name}", "ok", f"not here: {reason}" if reason else "runs here")

    def exports(self) -> Iterator[Finding]:
        """What `sun export` makes here; none of it is needed to serve."""
        from sun_build.export import onnx, tensorrt

        lacks = {"onnx": onnx.missing(), "tensorrt": tensorrt.missing()}
        for format, lack in lacks.items():
            yield Finding(f"export {format}", "ok", f"not here: {lack}" if lack else "runs here")

    def gpu(self) -> Iterator[Finding]:
        """Whether there is one; nothing here needs it."""
        import torch

        there = torch.cuda.is_available()
        yield Finding("GPU", "ok", torch.cuda.get_device_name() if there else "none: prefill and decode run on the CPU")
