"""The CUDA decode step checked and timed on a GPU, without a server or weights: `python -m sun_perf.gpu`."""
