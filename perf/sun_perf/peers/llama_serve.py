"""llama.cpp's own HTTP server for one model, through xllamacpp. Runs in the peer's environment, which has nothing of this project."""

from __future__ import annotations

import argparse
import signal

import xllamacpp


def main() -> None:
    """Serve until a signal ends the process; prints what the wheel was compiled for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="GGUF")
    parser.add_argument("--lora", action="append", default=[], help="GGUF adapter, off unless a request asks for it by its place in this list")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True, help="sequences decoded at once")
    parser.add_argument("--context", type=int, required=True, help="tokens of a slot")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = args.model
    params.hostnames, params.port = ["127.0.0.1"], args.port
    params.n_parallel, params.n_ctx = args.slots, args.slots * args.context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    params.lora_adapters = [adapter_of(path) for path in args.lora]
    params.lora_init_without_apply = True
    print(xllamacpp.get_system_info(), flush=True)
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


def adapter_of(path: str) -> xllamacpp.CommonAdapterLoraInfo:
    """An adapter to load, at full strength where it is asked for."""
    return xllamacpp.CommonAdapterLoraInfo(path, 1.0)


if __name__ == "__main__":
    main()
