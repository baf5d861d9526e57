"""The README's ways in are copied from it and run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.conftest import REPO

SECTION = re.search(r"## Three ways in\n(.*?)\n## ", (REPO / "README.md").read_text(), re.S)[1]
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", SECTION, re.S)


@pytest.mark.parametrize("language, block", BLOCKS, ids=["grpc", "curl", "cli"])
def test_way_in(server, client, language, block):
    grpc, http = f"localhost:{server.ports.grpc}", f"localhost:{server.ports.http}"
    block = block.replace("localhost:8001", grpc).replace("localhost:8000", http)
    block = block.replace(".venv/bin/sun ask", f"{Path(sys.prefix) / 'bin' / 'sun'} ask --url {grpc}")
    run = [sys.executable, "-c", block] if language == "python" else ["bash", "-euo", "pipefail", "-c", block]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rror" not in done.stdout + done.stderr
    expected = client.generate("bash", "find big files", sampling={"temperature": 0, "max_tokens": 32}).text
    if language == "bash" and "curl" in block:
        assert done.stdout.count('"text_output"') > 2
    else:
        assert done.stdout.strip() == expected.strip()
