"""What a model's config.pbtxt says."""

from __future__ import annotations

from pathlib import Path


def parameter(repository: Path, model: str, name: str) -> str:
    """A parameter of a model in a model repository; "" if it is not there, or the file is none that Triton would take."""
    # Here, because it brings grpc, and `sun --help` comes by those who import this.
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        config = text_format.Parse((repository / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    except (OSError, text_format.ParseError):
        return ""
    return config.parameters[name].string_value if name in config.parameters else ""
