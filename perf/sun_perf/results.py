"""Where results lie, and how one is written."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"


def write_result(path: Path, result: dict) -> None:
    """Write a result as JSON, readable and stable under git. Its folder is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
