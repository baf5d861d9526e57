"""Every request is counted once, by task and by how it ended, with times that fit together."""

from __future__ import annotations

import math
import shutil
from collections import Counter

from sun.router.errors import RequestError
from sun.router.gaps import BOUNDS, Gaps
from sun.router.meter import COUNTERS, METRICS
from sun.router.router import Limits

from .harness import TEXT, Answer, eventually


class Kept:
    """A meter that keeps what it is told."""

    def __init__(self) -> None:
        self.noted: list[tuple[str, float, dict[str, str]]] = []
        self.gauges: dict[tuple, float] = {}

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """See `Meter.add`."""
        assert name in METRICS and (METRICS[name].buckets or name.endswith(COUNTERS)) and labels.keys() == set(METRICS[name].labels)
        self.noted.append((name, value, labels))

    def set(self, name: str, value: float, **labels: str) -> None:
        """See `Meter.set`."""
        assert name in METRICS and not METRICS[name].buckets and not name.endswith(COUNTERS) and labels.keys() == set(METRICS[name].labels)
        self.gauges[name, *labels.values()] = value

    def values(self, name: str, **labels: str) -> list[float]:
        """What was noted under a name, with at least these labels."""
        return [value for seen, value, of in list(self.noted) if seen == name and labels.items() <= of.items()]


def test_a_requests_figures_are_noted_once_and_fit_together(serve):
    meter = Kept()
    service = serve(meter=meter)
    piece = service.ask(TEXT, "lora", max_tokens=9, ignore_eos=True).whole
    eventually(lambda: meter.values("sun_e2e_request_latency_seconds", task="lora"))
    (queued,), (prefill,), (handoff,), (first,), (each,), (whole,) = (meter.values(f"sun_{name}_seconds", task="lora") for name in (
        "request_queue_time", "request_prefill_time", "handoff", "time_to_first_token", "time_per_output_token", "e2e_request_latency"))
    assert 0 < queued and 0 < handoff and queued + prefill + handoff <= first + 1e-9 and abs(first + 8 * each - whole) < 0.5
    assert meter.values("sun_request_prompt_tokens", task="lora") == [piece.num_input_tokens]
    assert meter.values("sun_request_generation_tokens", task="lora") == [9]
    assert meter.values("sun_request_success_total", task="lora", finished_reason="length") == [1]
    geometry = service.fleet.prefills["lora"].model.geometry
    assert meter.values("sun_handoff_bytes_total", task="lora") == [geometry.kv_bytes(piece.num_input_tokens - 1, 4)]


def test_the_times_between_a_requests_tokens_are_told_within_a_second_and_add_up(serve):
    meter = Kept()
    assert serve(meter=meter).ask(TEXT, "lora", max_tokens=9, ignore_eos=True).whole
    gaps = "sun_inter_token_latency_seconds"
    eventually(lambda: sum(meter.values(f"{gaps}_bucket", task="lora", le="+Inf")) == sum(meter.values(f"{gaps}_count", task="lora")) == 8)
    (mean,) = meter.values("sun_time_per_output_token_seconds", task="lora")
    assert abs(sum(meter.values(f"{gaps}_sum", task="lora")) - 8 * mean) < 1e-6


def test_a_pause_is_in_its_bucket_and_all_wider_ones_and_is_told_once():
    meter = Kept()
    gaps = Gaps(meter)
    for seconds in (0.02, 0.025, 0.9, 100.0):
        gaps.note("lora", seconds)
    for _ in range(2):
        gaps.tell()
    counts = {bound: meter.values("sun_inter_token_latency_seconds_bucket", task="lora", le=bound) for bound in BOUNDS}
    assert counts == {bound: [0 if float(bound) < 0.025 else 2 if float(bound) < 1 else 3 if bound != "+Inf" else 4] for bound in BOUNDS}
    assert [name for name, _, _ in meter.noted].count("sun_inter_token_latency_seconds_sum") == 1


def test_refused_failed_and_cancelled_requests_are_told_apart(serve):
    meter = Kept()
    service = serve(meter=meter, limits=Limits(max_tokens=100))
    assert service.ask(TEXT, "poetry").error.code == "NOT_FOUND"
    assert service.ask(TEXT, max_tokens=1000).error.code == "INVALID_ARG"
    gate, gone = service.gate(), service.ask(TEXT, answer=Answer())
    gate.wait_entered(1)
    gone.gone = True
    assert gone.error.code == "CANCELLED"
    gate.open()

    def broken(*args):
        raise RequestError("UNAVAILABLE", "prefill_plain: has no process")

    service.fleet.prefill = broken
    assert service.ask(TEXT).error.code == "UNAVAILABLE"
    refused = Counter(labels["reason"] for name, _, labels in meter.noted if name == "sun_request_refused_total")
    failed = Counter(labels["reason"] for name, _, labels in meter.noted if name == "sun_request_failure_total")
    assert refused == {"NOT_FOUND": 1, "INVALID_ARG": 1} and failed == {"CANCELLED": 1, "UNAVAILABLE": 1}


def test_gauges_tell_what_runs_and_waits_and_which_workers_are_up(serve):
    meter = Kept()
    service = serve(meter=meter, workers=2)
    gates = [service.gate(worker) for worker in service.fleet.decodes]
    answers = [service.ask(TEXT, task, max_tokens=20, ignore_eos=True) for task in ("plain", "plain", "lora")]
    eventually(lambda: meter.gauges.get(("sun_num_requests_running", "plain")) == 2 and meter.gauges["sun_num_requests_running", "lora"] == 1)
    assert meter.gauges["sun_worker_up", "decode_0"] == meter.gauges["sun_worker_up", "decode_1"] == 1
    assert sum(meter.gauges["sun_worker_outstanding_tokens", worker] for worker in service.fleet.decodes) == 60
    for gate in gates:
        gate.open()
    assert all(answer.whole for answer in answers)
    eventually(lambda: meter.gauges["sun_num_requests_running", "plain"] == meter.gauges["sun_num_requests_running", "lora"] == 0)


def test_a_gauge_tells_which_prefill_modules_are_there_and_nothing_of_a_removed_tasks(serve, repository, tmp_path):
    tasks = shutil.copytree(repository, tmp_path / "repository")
    meter = Kept()
    service = serve(repository=tasks, meter=meter)
    eventually(lambda: meter.gauges.get(("sun_prefill_up", "lora")) == 1)
    service.fleet.present = lambda task: task != "lora"
    eventually(lambda: meter.gauges["sun_prefill_up", "lora"] == 0)
    assert meter.gauges["sun_prefill_up", "plain"] == 1
    shutil.rmtree(tasks / "prefill_lora")
    eventually(lambda: math.isnan(meter.gauges["sun_prefill_up", "lora"]))
    assert meter.gauges["sun_prefill_up", "plain"] == 1
