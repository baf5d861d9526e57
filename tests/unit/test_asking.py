"""What a person sees of `sun ask` and `sun key`, without a server."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from sun.router import key_file
from sun_build.config_file import parameter
from sun_client import cli_ask
from sun_client.cli import app
from sun_client.client import Piece
from sun_client.errors import SunError

CONFIG = 'backend: "sun_router"\ninstance_group [{ kind: KIND_CPU, count: 1 }]\nparameters { key: "policy" value { string_value: "least_tokens" } }\n'
KEYS = 'parameters {\n  key: "keys"\n  value { string_value: "secret/keys.json" } }\n'


@pytest.fixture
def root(tmp_path):
    """A repository's root with the router alone."""
    (tmp_path / "model_repository" / "sun").mkdir(parents=True)
    (tmp_path / "model_repository" / "sun" / "config.pbtxt").write_text(CONFIG)
    return tmp_path


class Full:
    """A client whose server has no room for the first so many requests."""

    refusals, waited = 1, []

    def __init__(self, *args):
        self.left = self.refusals

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def stream(self, **asked):
        if self.left:
            self.left -= 1
            raise SunError("max_inflight: full; retry after 7 s")
        yield Piece("hello", [1], finish_reason="stop")


@pytest.mark.parametrize(("refusals", "words", "waited", "code"), [(1, [], [], 1), (1, ["--retry"], [7], 0), (2, ["--retry"], [7], 1), (0, ["--retry"], [], 0)])
def test_ask_comes_back_once_and_only_when_told_to(monkeypatch, refusals, words, waited, code):
    slept = []
    monkeypatch.setattr(Full, "refusals", refusals)
    monkeypatch.setattr("sun_client.client.SunClient", Full)
    monkeypatch.setattr(cli_ask.time, "sleep", slept.append)
    result = CliRunner().invoke(app, ["ask", "--task", "bash", *words, "hi"])
    assert (slept, result.exit_code) == (waited, code) and ("hello" in result.output) == (code == 0)


@pytest.mark.parametrize(("message", "seconds"), [
    ("max_inflight: full; retry after 7 s", 7), ("max_inflight: full", None), ("task: 'x; retry after 7 s' is not known", None)])
def test_an_error_tells_when_to_come_back(message, seconds):
    assert SunError(message).retry_after_s == seconds


def test_keys_are_made_and_listed_and_the_line_that_turns_them_on_is_shown(root):
    run = CliRunner()
    made = run.invoke(app, ["key", "add", "alice", "--tasks", "banking, bash", "--max-inflight", "3", "--root", str(root)])
    assert made.exit_code == 0 and 'key: "keys" value { string_value: "keys.json" }' in made.stderr
    (key,) = key_file.read(root / "keys.json")
    assert key_file.digest(made.stdout.strip()) == key.sha256 and (key.tasks, key.max_inflight) == (["banking", "bash"], 3)
    listed = run.invoke(app, ["key", "list", "--root", str(root)])
    assert "alice" in listed.stdout and "banking, bash" in listed.stdout and key.sha256 not in listed.stdout
    assert run.invoke(app, ["key", "remove", "alice", "--root", str(root)]).exit_code == 0 and key_file.read(root / "keys.json") == []


def test_keys_go_where_the_router_is_told_to_look(root):
    with (root / "model_repository" / "sun" / "config.pbtxt").open("a") as config:
        config.write(KEYS)
    made = CliRunner().invoke(app, ["key", "add", "alice", "--root", str(root)])
    assert made.exit_code == 0 and "Keys are not asked for" not in made.stderr
    assert [key.name for key in key_file.read(root / "secret" / "keys.json")] == ["alice"]


def test_a_parameter_is_read_from_a_models_configuration(root):
    assert parameter(root / "model_repository", "sun", "policy") == "least_tokens"
    assert parameter(root / "model_repository", "sun", "keys") == parameter(root / "model_repository", "other", "keys") == ""
