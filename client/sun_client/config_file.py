"""The parameters in a model's config.pbtxt."""

from __future__ import annotations

import os
import re
from pathlib import Path

PARAMETER = 'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}\n'


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
