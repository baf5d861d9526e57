"""Triton model `decode_<k>`: one worker of the shared decode pool. Messages in, replies out (see sun/messages.py)."""

import contextlib
import ctypes
import itertools
import threading

import msgspec
import numpy as np
import triton_python_backend_utils as pb_utils

from sun import door
from sun.handoff.inline import Inline
from sun.handoff.shm import Shm
from sun.key import check_key
from sun.messages import Abort, Admit, Drain, GetStats, Listen, Reply, decode_request, encode
from sun.router.meter import STEPS_S
from sun.settings import Place
from sun_triton.meter import TritonMeter

METRICS = {
    "sun_decode_step_seconds": ("A decode step's time, by worker: the time between two tokens of all its sequences", STEPS_S),
    "sun_decode_batch_size": ("Sequences in a decode step, by worker", (1, 2, 4, 8, 16, 32, 64, 128)),
    "sun_decode_batch_tasks": ("Different tasks in a decode step, by worker", (1, 2, 4, 8, 16, 32)),
}
"""See `sun.router.meter.METRICS`."""


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """kv_tokens: the KV pool's budget. max_batch: most sequences in a step. threads: CPU threads of a step.

    cores: the worker runs on these alone, such as "0", "1-3" or "0,2"; empty for anywhere.

    scheme: of the weights: "fp32", or a low-bit one of `sun.model.quantise`. weights: folder of a checkpoint to decode with in
    place of the shared base, as conventional serving does; absolute or from the repository's parent.
    executor: "cpu", or "cuda" on the GPU of an instance group of KIND_GPU.
    """

    kv_tokens: int = 16384
    max_batch: int = 64
    threads: int = 1
    cores: str = ""
    scheme: str = "fp32"
    weights: str = ""
    executor: str = "cpu"


class TritonPythonModel:
    """A thin adapter: Triton requests <-> `DecodeEngine`."""

    @staticmethod
    def auto_complete_config(config):
        """One tensor each way; several replies a request, because `Listen` streams."""
        config.set_max_batch_size(0)
        config.add_input({"name": "message", "data_type": "TYPE_STRING", "dims": [-1]})
        config.add_output({"name": "reply", "data_type": "TYPE_STRING", "dims": [-1]})
        config.set_model_transaction_policy({"decoupled": True})
        return config

    def initialize(self, args):
        """Pack the shared weights and start the engine."""
        place = Place(args)
        settings = place.settings(Settings)
        place.run_on(settings.cores, settings.threads)
        # Here, because Triton imports this file once more only to complete the configuration, and torch takes seconds.
        from sun.decode.engine import DecodeEngine
        from sun.decode.executors import load
        from sun.model.loading import module_name

        device = place.device(settings.executor)
        own = place.folder("weights", settings.weights)
        loaded = load(settings.executor, place.base_dir, settings.scheme, own, settings.kv_tokens, settings.max_batch, settings.threads, device)
        self.shm, self.meter = Shm(), TritonMeter(METRICS)
        # glibc keeps the float32 copies that packing went through, 460 MB of them for a low-bit scheme.
        ctypes.CDLL(None).malloc_trim(0)

        def stepped(record):
            self.meter.add("sun_decode_step_seconds", record.ms / 1e3, worker=place.name)
            self.meter.add("sun_decode_batch_size", sum(record.tasks.values()), worker=place.name)
            self.meter.add("sun_decode_batch_tasks", len(record.tasks), worker=place.name)

        self.engine = DecodeEngine(
            loaded.base, loaded.executor, loaded.pool, [self.shm, Inline()], settings.max_batch, settings.threads, stepped, loaded.pick,
            module_name(loaded.base, settings.scheme, own))

    def execute(self, requests):
        """Answer at once, but for `Listen`, which a thread serves as long as its router has sequences here."""
        for request in requests:
            sender = request.get_response_sender()
            message, *shipment = [bytes(part) for part in pb_utils.get_input_tensor_by_name(request, "message").as_numpy().reshape(-1)] or [b""]
            try:
                decoded = decode_request(message)
                if not isinstance(decoded, (GetStats, Drain)):  # for `sun stats`, which tells what the metrics do; and this has a key of its own
                    door.check(request.parameters())
                self._answer(decoded, shipment, sender)
            except Exception as error:
                code = pb_utils.TritonError.INVALID_ARG if isinstance(error, ValueError) else pb_utils.TritonError.INTERNAL
                sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(f"message: {error}", code)), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _answer(self, message, shipment, sender):
        match message:
            case Listen(router=router, most=most):
                threading.Thread(target=self._stream, args=(router, most, sender), name=f"listen-{router}", daemon=True).start()
            case Admit():
                sender.send(response([self.engine.admit(message, shipment)]), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            case Abort(ids=ids):
                sender.send(response([self.engine.abort(ids)]), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            case Drain(key=key, on=on, evict=evict):
                check_key(key)
                sender.send(response([self.engine.drain(on, evict)]), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            case GetStats(after=after):
                sender.send(response([self.engine.stats(after)]), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _stream(self, router, most, sender):
        with contextlib.closing(self.engine.outbox.listen(router)) as listening:
            for steps in itertools.islice(listening, most or None):
                sender.send(response(steps))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self):
        """Stop the engine; what still decodes ends with an error."""
        self.engine.close()
        self.shm.close()
        self.meter.close()


def response(replies: list[Reply]):
    """Replies as the tensor `reply` [len(replies)]."""
    return pb_utils.InferenceResponse([pb_utils.Tensor("reply", np.array([encode(reply) for reply in replies], dtype=np.object_))])
