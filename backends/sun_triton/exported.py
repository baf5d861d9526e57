"""An exported prefill module that this server runs, called through Triton's business logic scripting (BLS)."""

import triton_python_backend_utils as pb_utils
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from sun.prefill.exported import INPUT, outputs


class ExportedModel:
    """A `sun.prefill.padded.Compute`. Blocks; may be called from any thread. states: see `outputs`.

    Raises ValueError for what the model refuses, OSError for one that is not there now, else RuntimeError.
    """

    def __init__(self, name: str, states: bool = False):
        self.name, self._outputs = name, outputs(states)

    def __call__(self, ids: Tensor) -> list[Tensor]:
        request = pb_utils.InferenceRequest(
            model_name=self.name, requested_output_names=list(self._outputs), inputs=[pb_utils.Tensor(INPUT, ids.numpy())],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0))
        response = request.exec()
        if response.has_error():
            error, kind = response.error(), pb_utils.TritonError
            raised = {kind.INVALID_ARG: ValueError, kind.UNAVAILABLE: OSError, kind.NOT_FOUND: OSError}.get(error.code(), RuntimeError)
            raise raised(f"{self.name}: {error.message()}")
        # By DLPack and not numpy: the response may own its memory, which must then live as long as the tensor does.
        return [from_dlpack(pb_utils.get_output_tensor_by_name(response, name).to_dlpack()).cpu() for name in self._outputs]
