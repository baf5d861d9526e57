"""The request log: a line for each request, no prompt unless asked for, and never a cost to a request."""

from __future__ import annotations

import json
import re
import threading
from datetime import UTC, datetime

import pytest

from sun.router import journal
from sun.router.errors import RequestError
from sun.router.journal import Journal
from sun.router.limits import Limits
from sun.router.record import Record
from sun.router.reports import Reports

from .harness import TEXT, Answer, eventually, within
from .test_meter import Kept

SECRET = "my card number is 4711"


@pytest.fixture
def reporting(tmp_path):
    """A function: a router's `told`, to the log at ``path``; closed after the test."""
    made = []

    def make(path=tmp_path / "log" / "requests.jsonl", prompts: bool = False, meter: Kept | None = None):
        made.append(Reports([Journal(path, prompts)], meter or Kept(), prompts))
        return made[-1]

    yield make
    for each in made:
        within(each.close)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_request_leaves_a_line_with_its_facts(serve, reporting, tmp_path):
    before = datetime.now(UTC)
    service, path = serve(told=reporting().note), tmp_path / "log" / "requests.jsonl"
    piece = service.ask(SECRET, "lora", max_tokens=9, ignore_eos=True, more={"id": "mine-1"}).whole
    eventually(lambda: lines(path))
    (line,) = lines(path)
    assert line["request_id"] == "mine-1" and line["task"] == "lora" and line["finish_reason"] == "length"
    assert (line["prompt_tokens"], line["output_tokens"]) == (piece.num_input_tokens, 9)
    assert line["workers"] == ["decode_0"] and line["moves"] == 0
    assert 0 < line["queue_ms"] + line["prefill_ms"] + line["handoff_ms"] <= line["ttft_ms"] + 0.2 and line["ttft_ms"] <= line["total_ms"] and line["tpot_ms"] >= 0
    assert before.timestamp() - 1 <= datetime.fromisoformat(line["time"]).timestamp() <= datetime.now(UTC).timestamp() + 1
    assert "error" not in line and SECRET not in path.read_text() and path.stat().st_mode & 0o777 == 0o600


def test_refused_and_failed_requests_leave_one_too_and_their_errors_repeat_nothing(serve, reporting, tmp_path):
    service, path = serve(told=reporting().note, limits=Limits(max_tokens=100)), tmp_path / "log" / "requests.jsonl"
    assert service.ask(TEXT, "poetry").error and service.ask(TEXT, max_tokens=1000).error
    service.router.refuse(RequestError("INVALID_ARG", f"messages[0].role: must not be {SECRET!r}"), Answer(), "broken-1")
    gate, gone = service.gate(), service.ask(TEXT)
    gate.wait_entered(1)
    gone.gone = True
    assert gone.error
    gate.open()
    eventually(lambda: len(lines(path)) == 4)
    told = {(line["error"], line.get("field"), line.get("task")) for line in lines(path)}
    assert told == {("NOT_FOUND", "task", "poetry"), ("INVALID_ARG", "sampling_parameters.max_tokens", "plain"),
                    ("INVALID_ARG", "messages[0].role", None), ("CANCELLED", None, "plain")}
    ids = [line["request_id"] for line in lines(path)]
    assert "broken-1" in ids and len(set(ids)) == 4 and SECRET not in path.read_text()


def test_prompts_are_in_it_when_asked_for(serve, reporting, tmp_path):
    service, path = serve(told=reporting(prompts=True).note), tmp_path / "log" / "requests.jsonl"
    assert service.ask(SECRET + "\n{\"forged\": 1}\n\u2028").whole
    eventually(lambda: lines(path))
    (line,) = lines(path)
    assert line["messages"][0]["content"].startswith(SECRET)


def test_the_file_is_rotated_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "FILE_BYTES", 2000)
    log = Journal(tmp_path / "requests.jsonl")
    for i in range(100):
        log.write(ended(str(i)))
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["requests.jsonl", *(f"requests.jsonl.{i}" for i in range(1, journal.OLD_FILES + 1))]
    assert all(file.stat().st_size <= 2000 and file.stat().st_mode & 0o777 == 0o600 for file in files)
    assert lines(files[0])[-1]["request_id"] == "99"


def ended(id: str) -> Record:
    """A record of a request that failed."""
    record = Record(id)
    record.fail(RequestError("INTERNAL", "out of luck"))
    return record


def test_a_full_disk_costs_lines_and_no_request_and_is_counted(serve, reporting):
    meter = Kept()
    service = serve(told=reporting("/dev/full", meter=meter).note)
    assert all(service.ask(TEXT).whole.text is not None for _ in range(3))
    eventually(lambda: len(meter.values("sun_records_lost_total", sink="request_log")) == 3)


def test_lines_are_written_again_when_the_disk_has_room_again(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.symlink_to("/dev/full")
    log = Journal(path)
    for i in range(3):
        with pytest.raises(OSError, match="No space left"):
            log.write(ended(str(i)))
    path.unlink()
    log.write(ended("after"))
    log.close()
    assert [line["request_id"] for line in lines(path)] == ["after"]


def test_a_sink_that_hangs_holds_up_no_request_and_the_close_no_longer_than_it_says(serve, monkeypatch):
    monkeypatch.setattr("sun.router.reports.CLOSE_S", 0.05)
    monkeypatch.setattr("sun.router.reports.MOST_WAITING", 2)
    go, meter = threading.Event(), Kept()

    class Hanging:
        name = "hanging"

        def write(self, record):
            go.wait()

        def close(self):
            pass

    reports = Reports([Hanging()], meter)
    service = serve(told=reports.note)
    assert all(service.ask(TEXT).whole.text is not None for _ in range(6))
    eventually(lambda: len(meter.values("sun_records_lost_total", sink="queue")) >= 3)
    within(reports.close)
    go.set()


def test_a_setting_names_a_file_or_none(tmp_path, monkeypatch):
    monkeypatch.delenv(journal.ENV, raising=False)
    assert journal.configured("", tmp_path, False) is None
    monkeypatch.setenv(journal.ENV, str(tmp_path / "env.jsonl"))
    assert journal.configured("off", tmp_path, False) is None
    for setting, name in (("", "env.jsonl"), ("mine.jsonl", "mine.jsonl")):
        log = journal.configured(setting, tmp_path, False)
        log.write(ended("1"))
        log.close()
        assert re.search('"error":"INTERNAL"', (tmp_path / name).read_text())
