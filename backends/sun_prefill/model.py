"""Triton model `prefill_<task>`: prompt token ids x1..x(n-1) in, a KV ticket out."""

import ctypes
from typing import Annotated

import msgspec
import numpy as np
import triton_python_backend_utils as pb_utils

from sun import door
from sun.gently import gently, go_gently
from sun.handoff.shm import LEASE_S
from sun.settings import Place
from sun.watchdog import HANG_S, Watchdog


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """token_budget: most tokens in a pass. threads: CPU threads of a pass. transport: "shm", "inline", or
    "cuda_ipc", from one GPU's memory into the same. handoff_tokens: KV of so many tokens has room there, on its way.

    cores: the module runs on these alone, such as "0", "1-3" or "0,2"; empty for anywhere. nice: 0 to 19, how far it lets
    others go first on a core that both want.

    scheme: of the linear layers, "fp32" or "int8"; on a GPU "fp32" or "bf16". prefix_tokens: K and V of so many tokens are kept, for prompts that begin alike; 0 is none.

    lease_s: seconds after which a ticket that nobody renews or releases disappears. max_ticket_tokens: of tickets by shm that may be outstanding
    together, neither released nor expired; 0 for no limit.

    hang_s: seconds that a pass may take, or the process stand still, before it ends itself to be loaded anew; see `Watchdog`.

    executor: what runs a pass: "torch", "onnx" (the task's exported module, here), "triton" (exported, as the model `kv_<task>`), or
    "cuda": torch on the GPU of an instance group of KIND_GPU; "tensorrt": the task's exported plan there.
    """

    token_budget: int = 512
    threads: int = 1
    cores: str = ""
    nice: int = 0
    scheme: str = "fp32"
    prefix_tokens: int = 512
    transport: str = "shm"
    lease_s: float = LEASE_S
    handoff_tokens: int = 8192
    max_ticket_tokens: Annotated[int, msgspec.Meta(ge=0)] = 1 << 16
    hang_s: float = HANG_S
    executor: str = "torch"


class TritonPythonModel:
    """A thin adapter: Triton requests <-> `PrefillEngine`."""

    @staticmethod
    def auto_complete_config(config):
        """One ticket a prompt. Not decoupled: Triton lets an ensemble's step mix its output with the ensemble's inputs only then."""
        config.set_max_batch_size(0)
        config.add_input({"name": "input_ids", "data_type": "TYPE_INT64", "dims": [-1]})
        config.add_output({"name": "ticket", "data_type": "TYPE_STRING", "dims": [-1]})
        return config

    def initialize(self, args):
        """Map the weights, become a publisher of KV, start the engine."""
        place = Place(args)
        settings = place.settings(Settings)
        if settings.transport == "cuda_ipc":
            place.only_one("its KV must lie on the GPU of the decode workers")
        place.run_on(settings.cores, settings.threads, settings.nice)
        task, model = gently(lambda: load(place, settings))
        from sun.handoff.transports import publisher
        from sun.prefill.engine import PrefillEngine

        room, most = (model.geometry.kv_bytes(tokens, model.dtype.itemsize) for tokens in (settings.handoff_tokens, settings.max_ticket_tokens))
        self.transport = publisher(settings.transport, settings.lease_s, place.device(settings.executor), room, most)
        self.engine = PrefillEngine(
            model, task, self.transport, settings.token_budget, settings.threads, settings.prefix_tokens, executor(place, settings, task, model))
        # glibc keeps the float32 copies that packing went through.
        ctypes.CDLL(None).malloc_trim(0)
        self.watchdog = Watchdog(self.engine.progress, settings.hang_s)

    def execute(self, requests):
        """Queue the prompts; each is answered when its KV is published."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                door.check(request.parameters())
                ids = pb_utils.get_input_tensor_by_name(request, "input_ids").as_numpy().reshape(-1).tolist()
                self.engine.submit(ids).add_done_callback(lambda future, sender=sender: answer(sender, future))
            except Exception as error:
                fail(sender, error)

    def finalize(self):
        """Finish what is queued; tickets end with this process."""
        self.engine.close()
        self.transport.close()
        self.watchdog.close()
        go_gently()


def load(place: Place, settings: Settings):
    """The task's manifest and module, and with them torch, which takes seconds; Triton imports this file once more only to complete the configuration."""
    import sun.prefill.engine  # noqa: F401
    from sun.prefill import executors

    return executors.load(place.base_dir, place.version_dir, settings.executor, settings.scheme, place.device(settings.executor))


def executor(place: Place, settings: Settings, task, model):
    """The executor that the parameter names; None for torch's own, on the CPU or where the module lies."""
    if settings.executor in ("torch", "cuda"):
        return None
    if settings.scheme != "fp32":
        raise ValueError(f"config.pbtxt of {place.name}: parameters: scheme {settings.scheme} runs in torch, and executor is {settings.executor!r}")
    from sun.prefill.exported import PLAN_FILE, checkpoint_of, kv_model
    from sun.prefill.onnx import OnnxExecutor
    from sun.prefill.padded import PaddedExecutor
    from sun.prefill.tensorrt import Plan
    from sun_triton.exported import ExportedModel

    match settings.executor:
        case "onnx":
            checkpoint = checkpoint_of(place.base_dir, place.version_dir, task)
            return OnnxExecutor(place.version_dir, checkpoint, model.base, task, settings.threads)
        case "tensorrt":
            return PaddedExecutor(Plan(place.version_dir / PLAN_FILE, place.device(settings.executor), task.whole_prompt), place.version_dir, model.base, task, "tensorrt")
        case "triton":
            if door.closed():
                raise ValueError(f"config.pbtxt of {place.name}: parameters: executor 'triton' has kv_{task.name} answer whoever asks, and inference keys are "
                                 "needed here; use 'torch' or 'onnx'")
            name = kv_model(task.name)
            return PaddedExecutor(ExportedModel(name, task.whole_prompt), place.repository / name / "1", model.base, task)


def answer(sender, future) -> None:
    """Send a finished prompt's shipment, or what went wrong."""
    if future.exception() is not None:
        return fail(sender, future.exception())
    ticket = pb_utils.Tensor("ticket", np.array(future.result(), dtype=np.object_))
    sender.send(pb_utils.InferenceResponse([ticket]), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def fail(sender, error: BaseException) -> None:
    """Send an error: the caller's for a ValueError, UNAVAILABLE for want of room, else ours."""
    kind = pb_utils.TritonError
    code = kind.INVALID_ARG if isinstance(error, ValueError) else kind.UNAVAILABLE if isinstance(error, OSError) else kind.INTERNAL
    sender.send(pb_utils.InferenceResponse(error=kind(str(error), code)), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
