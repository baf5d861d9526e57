"""NVIDIA's perf_analyzer as load generator: fetched into a scratch folder, run, and its profile read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sun_perf.samples import Sample
from sun_perf.workload import Request

WHEEL = "tritonclient==2.50.0"
"""Later ones need a newer glibc than many systems have. Not installed, since our own client needs a newer tritonclient."""
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
"""What the binary links to, and where the nvidia-pytriton wheel has it under another name."""
LONGEST_S = 3600


class PerfAnalyzer:
    """perf_analyzer 2.50, its requests taken from our list one by one."""

    name = "perf_analyzer 2.50"

    def __init__(self, folder: Path):
        """folder: where it is unpacked and writes its files. Fetches the wheel with pip; raises RuntimeError if that fails."""
        self.folder = folder
        self.binary = fetch(folder)

    def closed(self, url: str, requests: Sequence[Request], concurrency: int) -> list[Sample]:
        """See `Load.closed`."""
        return self._run(url, requests, ["--concurrency-range", str(concurrency)])

    def open(self, url: str, requests: Sequence[Request], gaps: Sequence[float]) -> list[Sample]:
        """See `Load.open`."""
        schedule = self.folder / "intervals"
        # It takes whole microseconds, and none may be 0.
        schedule.write_text("\n".join(str(max(1, round(gap * 1e6))) for gap in gaps))
        return self._run(url, requests, ["--request-intervals", str(schedule)])

    def _run(self, url: str, requests: Sequence[Request], mode: list[str]) -> list[Sample]:
        data, profile = self.folder / "requests.json", self.folder / "profile.json"
        data.write_text(json.dumps({"data": [inputs(request) for request in requests]}))
        profile.unlink(missing_ok=True)
        command = [
            str(self.binary), "-m", "sun", "-i", "grpc", "-u", url, "--streaming", "--async", "--input-data", str(data),
            "--request-count", str(len(requests)), "--profile-export-file", str(profile), *mode]
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self.folder / "lib")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONGEST_S)
        if done.returncode or not profile.is_file():
            raise RuntimeError(f"perf_analyzer ended with code {done.returncode}: {(done.stderr or done.stdout).strip()[-1000:]}")
        return read_profile(json.loads(profile.read_text()))


@contextmanager
def perf_analyzer(scratch: Path) -> Iterator[PerfAnalyzer]:
    """A perf_analyzer whose files are gone afterwards."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix="perf_analyzer-") as folder:
        yield PerfAnalyzer(Path(folder))


def fetch(folder: Path) -> Path:
    """Download the wheel into ``folder`` and take the binary out, with links to the libraries it misses. Returns its path."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL],
        capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"perf_analyzer: pip cannot fetch {WHEEL} ({done.stderr.strip()[-300:]}); --load own does without it")
    binary = folder / "perf_analyzer"
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith("/bin/perf_analyzer"))
        binary.write_bytes(wheel.read(name))
    binary.chmod(0o755)
    have = next(Path(sys.prefix).glob("lib/python*/site-packages/nvidia_pytriton.libs"))
    (folder / "lib").mkdir()
    for needed, pattern in LIBRARIES.items():
        (folder / "lib" / needed).symlink_to(next(have.glob(pattern)))
    return binary


def inputs(request: Request) -> dict[str, dict]:
    """A request in the form of ``--input-data``."""
    values = {
        "task": request.task, "text_input": request.prompt, "stream": True, "return_num_output_tokens": True,
        "sampling_parameters": json.dumps(request.sampling)}
    return {name: {"content": [value], "shape": [1]} for name, value in values.items()}


def read_profile(profile: dict) -> list[Sample]:
    """The samples in a ``--profile-export-file`` (its times are in ns)."""
    samples = []
    for request in profile["experiments"][0]["requests"]:
        counts = [int(output.get("num_output_tokens") or 0) for output in request["response_outputs"]]
        times = [at / 1e9 for at, count in zip(request["response_timestamps"], counts, strict=True) for _ in range(count)]
        samples.append(Sample(request["request_inputs"]["task"], request["timestamp"] / 1e9, tuple(times)))
    return samples
