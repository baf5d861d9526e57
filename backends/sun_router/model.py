"""Triton model `sun`: the front door. Text in, text out, for every task; prefill and decode are called through BLS."""

import json

import msgspec

from sun import door
from sun.handoff.cuda_ipc import CudaIpc
from sun.handoff.shm import Shm
from sun.key import LEAVE, check_key
from sun.model.manifest import BaseManifest
from sun.router import journal
from sun.router.active import Piece
from sun.router.errors import RequestError
from sun.router.fair_queue import Bounds, parse_weights
from sun.router.keys import Keys
from sun.router.limits import Limits
from sun.router.meter import METRICS
from sun.router.policy import make_policy
from sun.router.reports import Reports
from sun.router.request import INPUTS, OUTPUTS, came_with, parse_request
from sun.router.router import Router
from sun.router.spans import otlp_spans
from sun.router.tasks import TaskRegistry
from sun.settings import Place
from sun.text.prompt import PromptFormat
from sun_router.client import TritonClient
from sun_router.fleet import BlsFleet
from sun_triton.meter import TritonMeter


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """policy: "least_tokens", "pack", "round_robin" or "partitioned". workers: decode models by name, separated by spaces (default: all `decode_*`).

    owners: with policy partitioned, which task has which workers, e.g. "banking=decode_0 bash=decode_1,decode_2".
    pack_batch: with policy pack, how many sequences a worker gets before the next one gets any; 0 for the policy's own.
    max_inflight, max_tokens, deadline_s, max_running_tokens: see `sun.router.limits.Limits`. max_queued_tokens,
    max_task_queued_tokens, weights ("banking=2 bash=1"): see `sun.router.fair_queue.Bounds`.
    keys: the file of inference keys, absolute or from the repository's parent; without it anybody may ask. request_log: the file with
    a line for each request, likewise, or "off"; log_prompts: whether prompts are in it. otlp_endpoint: see `sun.router.spans.otlp_spans`.
    """

    policy: str = "least_tokens"
    workers: str = ""
    owners: str = ""
    pack_batch: int = 0
    max_inflight: int = Limits.max_inflight
    max_tokens: int = Limits.max_tokens
    deadline_s: float = Limits.deadline_s
    max_running_tokens: int = Limits.max_running_tokens
    max_queued_tokens: int = Bounds.tokens
    max_task_queued_tokens: int = Bounds.task_tokens
    weights: str = ""
    keys: str = ""
    request_log: str = ""
    log_prompts: bool = False
    otlp_endpoint: str = ""


class TritonPythonModel:
    """A thin adapter: Triton requests <-> `Router`."""

    @staticmethod
    def auto_complete_config(config):
        """Inputs and outputs as in Triton's vLLM backend, plus the task, messages, and the ensembles' way in."""
        config.set_max_batch_size(0)
        for name, data_type in INPUTS.items():
            config.add_input({"name": name, "data_type": data_type, "dims": [-1], "optional": True})
        for name, data_type in OUTPUTS.items():
            config.add_output({"name": name, "data_type": data_type, "dims": [-1]})
        config.set_model_transaction_policy({"decoupled": True})
        return config

    def initialize(self, args):
        """Find the workers and start the router."""
        place = Place(args)
        settings = place.settings(Settings)
        workers = settings.workers.split() or sorted(path.name for path in place.repository.glob("decode_*") if path.is_dir())
        if not workers:
            raise ValueError(f"{place.repository}: no decode worker; there must be at least one folder decode_<k>")
        base = BaseManifest.load(place.base_dir)
        limits = Limits(
            settings.max_inflight, min(settings.max_tokens, base.max_context), settings.deadline_s,
            max_running_tokens=settings.max_running_tokens,
            queue=Bounds(settings.max_queued_tokens, settings.max_task_queued_tokens, parse_weights(settings.weights)))
        keys = Keys(place.repository.parent / settings.keys) if settings.keys else None
        if keys is not None:
            door.demand()
        sinks = (journal.configured(settings.request_log, place.repository.parent, settings.log_prompts), otlp_spans(settings.otlp_endpoint))
        self.shm, self.meter = Shm(), TritonMeter(METRICS)
        self.reports = Reports([sink for sink in sinks if sink is not None], self.meter, settings.log_prompts)
        self.router = Router(
            BlsFleet(), workers, TaskRegistry(place.repository), PromptFormat.load(place.base_dir, base.prompt),
            make_policy(settings.policy, settings.owners, workers, settings.pack_batch), [self.shm, CudaIpc(self.shm)], limits, self.meter,
            keys, self.reports.note)

    def execute(self, requests):
        """Hand the requests to the router, which answers from its own threads."""
        for request in requests:
            client = TritonClient(request)
            try:
                inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                parameters = json.loads(request.parameters() or "{}")
                client.codes = parameters.pop("error_codes", False) is True
                if (key := parameters.pop(LEAVE, None)) is not None:
                    client.send(Piece(text=str(self._leave(key)), finish_reason="stop"))
                    continue
                parsed = parse_request(inputs, parameters, request.request_id())
            except RequestError as error:
                self.router.refuse(error, client, request.request_id(), came_with(inputs))
            else:
                client.returns = parsed.returns
                self.router.submit(parsed, client)

    def _leave(self, key):
        try:
            check_key(str(key))
        except PermissionError as error:
            raise RequestError("PERMISSION_DENIED", f"{LEAVE}: {error}") from error
        return self.router.leave()

    def finalize(self):
        """End what is in flight and stop."""
        self.router.close()
        self.reports.close()
        self.shm.close()
        self.meter.close()
