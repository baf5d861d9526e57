"""The parameters in a model's config.pbtxt."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

TEXT = r'"(?:[^"\\]|\\.)*"'
ENTRY = r'parameters\s*:?\s*\{{\s*key\s*:\s*"{name}"\s*[,;]?\s*value\s*:?\s*\{{\s*string_value\s*:\s*{text}\s*\}}\s*\}}\n?'
"""A parameter as Triton's examples and ours write it."""


def parameter(repository: Path, model: str, name: str) -> str:
    """A parameter of a model in a model repository; "" if it is not there, or the file is none that Triton would take."""
    try:
        return _read((repository / model / "config.pbtxt").read_text(), name)
    except (OSError, ValueError):
        return ""


def entry(name: str, value: str) -> str:
    """A parameter as a line of a configuration's text."""
    return f'parameters {{ key: "{name}" value {{ string_value: {json.dumps(value, ensure_ascii=False)} }} }}\n'


def set_parameter(config: Path, name: str, value: str) -> None:
    """Write a parameter in place of an earlier one; the empty string only takes that away.

    Raises ValueError naming the file if Triton would not take it, or if the earlier one is not written as `ENTRY` has it.
    """
    text = without(config.read_text(), name).rstrip("\n") + "\n"
    if value:
        text += entry(name, value)
    try:
        written = _read(text, name)
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from error
    if written != value:
        raise ValueError(f"{config}: its parameter {name} is written in a form that is not known here; edit it by hand")
    write_whole(config, text)


def without(text: str, name: str) -> str:
    """A configuration's text less a parameter that is written as `ENTRY` has it."""
    return re.sub(ENTRY.format(name=re.escape(name), text=TEXT), "", text)


def _read(text: str, name: str) -> str:
    """A parameter in a configuration's text. Raises ValueError if that is none."""
    # Here, because it brings grpc, and `sun --help` comes by those who import this.
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ValueError(str(error)) from error
    return config.parameters[name].string_value if name in config.parameters else ""


def write_whole(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees half of it, also where the disk is full."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        fresh.write_text(text)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
