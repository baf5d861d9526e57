"""Parameters in a model's `config.pbtxt`, set by commands."""

from __future__ import annotations

import re
from pathlib import Path

ENTRY = r'parameters\s*\{\s*key:\s*"%s"\s*value\s*\{\s*string_value:\s*"[^"]*"\s*\}\s*\}\n?'


def set_parameter(config: Path, key: str, value: str) -> None:
    """Write a parameter into a config.pbtxt, in place of an earlier value."""
    kept = re.sub(ENTRY % re.escape(key), "", config.read_text()).rstrip("\n")
    config.write_text(f'{kept}\nparameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n')
