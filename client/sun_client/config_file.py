"""The parameters in a model's config.pbtxt."""

from __future__ import annotations

import os
import re
from pathlib import Path

PARAMETER = 'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}\n'


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


def set_parameter(config: Path, name: str, value: str) -> None:
    """Write a parameter in place of an earlier one; the empty string only takes that away."""
    earlier = re.compile(rf'parameters\s*\{{\s*key:\s*"{name}"\s*value\s*\{{\s*string_value:\s*"[^"]*"\s*\}}\s*\}}\n?')
    kept = earlier.sub("", config.read_text()).rstrip("\n") + "\n"
    write_whole(config, kept + (PARAMETER.format(name=name, value=value) if value else ""))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees half of it, also where the disk is full."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_text(text)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
