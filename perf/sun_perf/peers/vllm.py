"""vLLM's CPU build: one server, the adapters by their tasks' names."""

from __future__ import annotations

from sun_perf.peers.http_server import HttpSystem
from sun_perf.peers.prompts import TASKS
from sun_perf.peers.system import CONTEXT, Place

PORT = 3
"""Offset of its port: ours has those below."""
RANK = 16
"""The smallest that vLLM has room for among those that hold the adapters' 12."""
KV_GB = 1


class Vllm(HttpSystem):
    """One server in float32; a request names the task as its model."""

    peer = "vllm"

    def __init__(self, place: Place):
        super().__init__(place)
        self.settings = {
            "engine": self.environment.pins[0], "dtype": "float32", "threads": place.threads, "max_num_seqs": place.most,
            "tasks": "one server, an adapter a request"}

    def start(self) -> None:
        """Serve."""
        port = self.place.port + PORT
        adapters = {task: self.place.adapter(task) for task in TASKS if self.place.adapter(task)}
        # Not `vllm serve`: this wheel's command looks its version up under a name that it is not installed by, and fails.
        command = [
            self.environment.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.place.root.base), "--host", "127.0.0.1", "--port", str(port),
            "--served-model-name", *(task for task in TASKS if task not in adapters), "--dtype", "float32", "--max-model-len", str(CONTEXT),
            "--max-num-seqs", str(self.place.most), "--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(RANK),
            "--lora-modules", *(f"{task}={folder}" for task, folder in adapters.items())]
        # Left alone it keeps one of two CPUs for its front end.
        env = {
            "VLLM_CPU_KVCACHE_SPACE": str(KV_GB), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(self.place.threads),
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        self.serve([(command, port)], env)

    def route(self, task: str) -> tuple[int, dict]:
        """The server, with the task as the model's name."""
        return self.place.port + PORT, {"model": task}
