"""Triton model `tokenize`: the first step of the ensembles. A conversation in, prompt token ids out."""

import numpy as np
import triton_python_backend_utils as pb_utils

from sun.model.manifest import BaseManifest
from sun.router.request import parse_text
from sun.settings import Place
from sun.text.prompt import PromptFormat


class TritonPythonModel:
    """A thin adapter: Triton requests <-> `PromptFormat`."""

    @staticmethod
    def auto_complete_config(config):
        """text_input or messages; the whole prompt for decode, and it less its last token for prefill."""
        config.set_max_batch_size(0)
        for name in ("text_input", "messages"):
            config.add_input({"name": name, "data_type": "TYPE_STRING", "dims": [-1], "optional": True})
        for name in ("prompt_ids", "input_ids"):
            config.add_output({"name": name, "data_type": "TYPE_INT64", "dims": [-1]})
        return config

    def initialize(self, args):
        """Load the tokeniser."""
        place = Place(args)
        base = BaseManifest.load(place.base_dir)
        self.limit = base.max_context
        self.prompts = PromptFormat.load(place.base_dir, base.prompt)

    def execute(self, requests):
        """Tokenise each request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        try:
            ids = self.prompts.encode(parse_text({tensor.name(): tensor.as_numpy() for tensor in request.inputs()}))
            if not 0 < len(ids) < self.limit:
                raise ValueError(f"text_input: the prompt has {len(ids)} tokens, it must be 1 to {self.limit - 1}")
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        prompt = np.array(ids, dtype=np.int64)
        return pb_utils.InferenceResponse([pb_utils.Tensor("prompt_ids", prompt), pb_utils.Tensor("input_ids", prompt[:-1])])
