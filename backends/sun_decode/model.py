"""Triton model `decode_<k>`: one worker of the shared decode pool. Messages in, replies out (see sun/messages.py)."""

import ctypes

import msgspec
import numpy as np
import triton_python_backend_utils as pb_utils

from sun import door
from sun.events import EventServer
from sun.gently import go_gently
from sun.key import check_key
from sun.messages import Abort, Admit, Drain, GetStats, decode_request, encode
from sun.router.meter import WORKER_METRICS
from sun.settings import Place
from sun.slots import KV_TOKENS
from sun.watchdog import HANG_S, Watchdog
from sun_triton.meter import TritonMeter

GRACE_S = 25.0
"""For sequences to end once the model is to be unloaded; a server that is told to stop ends after 30 s (--exit-timeout-secs)."""


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """kv_tokens: the KV pool's budget. max_batch: most sequences in a step. threads: CPU threads of a step.

    cores: the worker runs on these alone, such as "0", "1-3" or "0,2"; empty for anywhere.

    scheme: of the weights: "fp32", or a low-bit one of `sun.model.quantise`. weights: folder of a checkpoint to decode with in
    place of the shared base, as conventional serving does; absolute or from the repository's parent.
    executor: "cpu", or "cuda" on the GPU of an instance group of KIND_GPU.
    hang_s: seconds that a step may take, or the process stand still, before it ends itself to be loaded anew; see `Watchdog`.
    """

    kv_tokens: int = KV_TOKENS
    max_batch: int = 64
    threads: int = 1
    cores: str = ""
    scheme: str = "fp32"
    weights: str = ""
    executor: str = "cpu"
    hang_s: float = HANG_S


class TritonPythonModel:
    """A thin adapter: Triton requests <-> `DecodeEngine`."""

    @staticmethod
    def auto_complete_config(config):
        """One tensor each way. Not decoupled: where a decoupled model's process dies while Triton passes its response on, tritonserver may abort (24.10)."""
        config.set_max_batch_size(0)
        config.add_input({"name": "message", "data_type": "TYPE_STRING", "dims": [-1]})
        config.add_output({"name": "reply", "data_type": "TYPE_STRING", "dims": [-1]})
        return config

    def initialize(self, args):
        """Pack the shared weights and start the engine."""
        place = Place(args)
        settings = place.settings(Settings)
        place.only_one("each would be a worker with a pool of its own, and the router knows one by this name; further workers are further models")
        place.run_on(settings.cores, settings.threads)
        # Here, because Triton imports this file once more only to complete the configuration, and torch takes seconds.
        from sun.decode.engine import DecodeEngine
        from sun.decode.executors import load
        from sun.handoff.transports import pullers
        from sun.model.loading import module_name

        device = place.device(settings.executor)
        own = place.folder("weights", settings.weights)
        loaded = load(settings.executor, place.base_dir, settings.scheme, own, settings.kv_tokens, settings.max_batch, settings.threads, device)
        self.transports, self.meter = pullers(device), TritonMeter(WORKER_METRICS)
        # glibc keeps the float32 copies that packing went through, 460 MB of them for a low-bit scheme.
        ctypes.CDLL(None).malloc_trim(0)

        def stepped(record):
            self.meter.add("sun_decode_step_seconds", record.ms / 1e3, worker=place.name)
            self.meter.add("sun_decode_batch_size", sum(record.tasks.values()), worker=place.name)
            self.meter.add("sun_decode_batch_tasks", len(record.tasks), worker=place.name)

        self.engine = DecodeEngine(
            loaded.base, loaded.executor, loaded.pool, self.transports, settings.max_batch, settings.threads, stepped, loaded.pick,
            module_name(loaded.base, settings.scheme, own))
        self.events = EventServer(self.engine.outbox)
        self.watchdog = Watchdog(self.engine.progress, settings.hang_s)

    def execute(self, requests):
        """Answer at once."""
        return [self._response(request) for request in requests]

    def _response(self, request):
        message, *shipment = [bytes(part) for part in pb_utils.get_input_tensor_by_name(request, "message").as_numpy().reshape(-1)] or [b""]
        try:
            decoded = decode_request(message)
            if not isinstance(decoded, (GetStats, Drain)):  # for `sun stats`, which tells what the metrics do; and this has a key of its own
                door.check(request.parameters())
            reply = encode(self._answer(decoded, shipment))
        except Exception as error:
            code = pb_utils.TritonError.INVALID_ARG if isinstance(error, ValueError) else pb_utils.TritonError.INTERNAL
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"message: {error}", code))
        return pb_utils.InferenceResponse([pb_utils.Tensor("reply", np.array([reply], dtype=np.object_))])

    def _answer(self, message, shipment):
        match message:
            case Admit():
                return self.engine.admit(message, shipment)
            case Abort(ids=ids):
                return self.engine.abort(ids)
            case Drain(key=key, on=on, evict=evict):
                check_key(key)
                return self.engine.drain(on, evict)
            case GetStats(after=after):
                return self.engine.stats(after)

    def finalize(self):
        """Let the sequences that are here end, if they do in time, and stop the engine; routers find other workers for those that do not.

        Triton does not wait for them: it knows of no call that is under way here.
        """
        self.engine.drain()
        self.engine.wait_idle(GRACE_S)
        self.events.close()
        self.engine.close()
        for transport in self.transports:
            transport.close()
        self.meter.close()
        self.watchdog.close()
        go_gently()
