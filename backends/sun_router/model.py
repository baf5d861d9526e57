"""Triton model `sun`: the front door. Text in, text out, for every task; prefill and decode are called through BLS."""

import json

import msgspec

from sun.handoff.shm import Shm
from sun.model.manifest import BaseManifest
from sun.router.errors import RequestError
from sun.router.policy import make_policy
from sun.router.request import INPUTS, OUTPUTS, parse_request
from sun.router.router import Limits, Router
from sun.router.tasks import TaskRegistry
from sun.settings import Place
from sun.text.prompt import PromptFormat
from sun_router.client import TritonClient
from sun_router.fleet import BlsFleet


class Settings(msgspec.Struct, forbid_unknown_fields=True):
    """policy: "least_tokens", "round_robin" or "partitioned". workers: decode models by name, separated by spaces (default: all `decode_*`).

    owners: with policy partitioned, which task has which workers, e.g. "banking=decode_0 bash=decode_1,decode_2".
    max_inflight, max_tokens, deadline_s: see `sun.router.router.Limits`.
    """

    policy: str = "least_tokens"
    workers: str = ""
    owners: str = ""
    max_inflight: int = Limits.max_inflight
    max_tokens: int = Limits.max_tokens
    deadline_s: float = Limits.deadline_s


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
        limits = Limits(settings.max_inflight, min(settings.max_tokens, base.max_context), settings.deadline_s)
        self.shm = Shm()
        self.router = Router(
            BlsFleet(), workers, TaskRegistry(place.repository), PromptFormat.load(place.base_dir, base.prompt),
            make_policy(settings.policy, settings.owners, workers), [self.shm], limits)

    def execute(self, requests):
        """Hand the requests to the router, which answers from its own threads."""
        for request in requests:
            client = TritonClient(request)
            try:
                inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                parsed = parse_request(inputs, json.loads(request.parameters() or "{}"))
            except RequestError as error:
                client.fail(error)
            else:
                client.returns = parsed.returns
                self.router.submit(parsed, client)

    def finalize(self):
        """End what is in flight and stop."""
        self.router.close()
        self.shm.close()
