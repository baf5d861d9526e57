"""A task's prefill module for other runtimes: ONNX, and TensorRT engines made of it."""
