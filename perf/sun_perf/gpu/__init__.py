"""The CUDA decode step, prefill and the handoff between them checked and timed on a GPU, without a server or weights: `python -m sun_perf.gpu`."""
