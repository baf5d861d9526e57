"""The gateway over real HTTP, with a server behind it that is made up: statuses, streams, clients that leave, and the end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from sun_client.errors import SunError
from sun_client.gateway import app, child
from sun_client.gateway.app import BODY_BYTES
from sun_client.gateway.serve import Door
from sun_client.server import Server, Tls
from sun_client.wire import Piece

from .harness import eventually

BODY = {"model": "bash", "messages": [{"role": "user", "content": "hello"}]}
STREAM = {**BODY, "stream": True}
SOON_S = 20.0


class Fake:
    """An `Upstream` whose answers are what the task says; `left` counts answers that were not read to their end."""

    url = "nowhere"

    def __init__(self) -> None:
        self.asked: list = []
        self.left = 0
        self.go = asyncio.Event()

    async def close(self) -> None:
        """Nothing to close."""

    async def tasks(self) -> list[str]:
        """Two."""
        return ["bash", "math"]

    async def healthy(self) -> bool:
        """Always."""
        return True

    async def module(self) -> str:
        """A module's name."""
        return "fp32 sha256:abc"

    async def pieces(self, request) -> AsyncIterator[Piece]:
        """Two pieces; between them the task `slow` waits for `go`, `breaks` breaks, and `flood` goes on for ever."""
        self.asked.append(request)
        task, whole = request.raw_input_contents[0][4:].decode(), False
        if task == "full":
            raise SunError("max_inflight: full; retry after 3 s", "UNAVAILABLE")
        if task == "bug":
            raise KeyError("secret")
        try:
            yield Piece("he", [1], [], 5)
            if task == "slow":
                await self.go.wait()
            while task == "flood":
                yield Piece("x" * (1 << 20), [1], [], 5)
            if task == "breaks":
                raise SunError("the router is shutting down", "UNAVAILABLE")
            yield Piece("llo", [2], [], 5, "stop")
            whole = True
        finally:
            self.left += not whole


def serve(use: Callable[[Door, Fake, aiohttp.ClientSession], Awaitable[None]], **options) -> None:
    """Run ``use`` with a gateway that listens, and a session whose base is its address."""

    async def main() -> None:
        fake = Fake()
        door = Door(fake, "127.0.0.1", 0, **options)
        port = await door.start()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            async with asyncio.timeout(SOON_S):
                await use(door, fake, session)
        await door.stop(0.0)

    asyncio.run(main())


async def post(session: aiohttp.ClientSession, body: object, **options) -> tuple[int, dict, dict]:
    """Status, JSON and headers of an answer, these by names in lower case."""
    async with session.post("/v1/chat/completions", data=body if isinstance(body, bytes) else json.dumps(body), **options) as response:
        return response.status, await response.json(), {name.lower(): value for name, value in response.headers.items()}


async def until(holds: Callable[[], bool]) -> None:
    """Wait until ``holds``."""
    while not holds():
        await asyncio.sleep(0.01)


def events(text: str) -> list:
    """The data of server-sent events; [DONE] as it is."""
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def test_whole_answers_and_streams():
    async def use(door, fake, session):
        given = {"X-Request-Id": "mine", "Authorization": "Bearer key", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
        status, answer, headers = await post(session, BODY, headers=given)
        assert status == 200 and answer["choices"][0]["message"]["content"] == "hello"
        assert answer["id"] == headers["x-request-id"] == "chatcmpl-mine"
        request = fake.asked[0]
        assert request.id == answer["id"] and request.parameters["api_key"].string_param == "key"
        assert request.parameters["traceparent"].string_param == given["traceparent"]
        body = {**STREAM, "n": 3, "stream_options": {"include_usage": True}}
        async with session.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "b d"}) as response:
            assert response.content_type == "text/event-stream" and "b d" not in response.headers["X-Request-Id"]
            *chunks, usage, done = events(await response.text())
        assert done == "[DONE]" and usage["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11} and usage["choices"] == []
        texts = ["", "", ""]
        for chunk in chunks:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
        assert texts == ["hello"] * 3 and fake.left == 0 and len({request.id for request in fake.asked}) == 4

    serve(use)


def test_errors_before_an_answer_have_a_status_and_later_ones_an_event():
    async def use(door, fake, session):
        for stream in (False, True):
            status, answer, headers = await post(session, {**BODY, "model": "full", "stream": stream})
            assert (status, headers["retry-after"], answer["error"]["code"]) == (429, "3", "rate_limit_exceeded")
            status, answer, _ = await post(session, {**BODY, "model": "bug", "stream": stream})
            assert status == 500 and "secret" not in str(answer)
        async with session.post("/v1/chat/completions", json={**STREAM, "model": "breaks"}) as response:
            assert response.status == 200
            assert [list(event) for event in events(await response.text())][-1] == ["error"]
        assert (await post(session, {**BODY, "model": "breaks"}))[0] == 503

    serve(use)


def test_models_health_and_unknown_addresses():
    async def use(door, fake, session):
        for path, status, word in (("/v1/models", 200, "math"), ("/v1/models/bash", 200, "bash"), ("/v1/models/x", 404, "model_not_found"),
                                   ("/health", 200, "ok"), ("/x", 404, "unknown_url"), ("/v1/chat/completions", 405, "unknown_url")):
            async with session.get(path) as response:
                assert (response.status, response.content_type) == (status, "application/json") and word in await response.text()
        async with session.post("/v1/completions", json={}) as response:
            assert response.status == 404 and "chat template" in await response.text()
        assert (await post(session, b" " * (BODY_BYTES + 1)))[0] == 413
        assert (await post(session, {**BODY, "messages": [{"role": "user", "content": "x" * 100_000}]}))[0] == 200

    serve(use)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request_alone(stream):
    async def use(door, fake, session):
        kept = asyncio.ensure_future(post(session, {**BODY, "model": "slow"}))
        gone = asyncio.ensure_future(session.post("/v1/chat/completions", json={**BODY, "model": "slow", "stream": stream, "n": 2}))
        await until(lambda: len(fake.asked) == 3)
        if stream:
            (await gone).close()
        gone.cancel()
        await until(lambda: fake.left == 2)
        fake.go.set()
        assert (await kept)[1]["choices"][0]["message"]["content"] == "hello"

    serve(use)


def test_it_ends_when_streams_have_and_tells_those_that_have_not():
    async def use(door, fake, session):
        async with session.post("/v1/chat/completions", json={**STREAM, "model": "slow"}) as response:
            stopping = asyncio.ensure_future(door.stop(SOON_S))
            await asyncio.sleep(0.05)
            assert not stopping.done()
            fake.go.set()
            assert events(await response.text())[-1] == "[DONE]"
            await stopping
        with pytest.raises(aiohttp.ClientError):
            await session.get("/health")

    async def cut(door, fake, session):
        whole = asyncio.ensure_future(post(session, {**BODY, "model": "slow"}))
        async with session.post("/v1/chat/completions", json={**STREAM, "model": "slow"}) as response:
            await until(lambda: len(fake.asked) == 2)
            await door.stop(0.0)
            assert "shutting down" in events(await response.text())[-1]["error"]["message"]
        assert (await whole)[0] == 503 and fake.left == 2

    serve(use)
    serve(cut)


def test_a_client_that_does_not_read_is_let_go_and_disturbs_nobody(monkeypatch):
    async def use(door, fake, session):
        async with session.post("/v1/chat/completions", json={**STREAM, "model": "flood"}):
            assert (await post(session, BODY))[0] == 200
            await until(lambda: fake.left == 1)

    monkeypatch.setattr(app, "SLOW_S", 0.3)
    serve(use)


def test_a_connection_too_many_is_told_so():
    async def use(door, fake, session):
        first = asyncio.ensure_future(post(session, {**BODY, "model": "slow"}))
        await until(lambda: bool(fake.asked))
        async with session.get("/health") as response:
            assert response.status == 503 and (await response.json())["error"]["code"] == "too_many_connections"
        fake.go.set()
        assert (await first)[0] == 200

    serve(use, connections=1)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)


def test_no_body_and_no_header_makes_it_fail():
    async def use(door, fake, session):
        for body in bodies:
            assert (await post(session, body))[0] in (200, 400)
        assert (await post(session, b"no gzip", headers={"Content-Encoding": "gzip"}))[0] == 400
        for path in ("/%ff", "/v1/models/%ff", "/v1/models/%00", "/v1/models/a%2fb"):
            async with session.get(URL(path, encoded=True)) as response:
                assert response.status == 404 and (await response.json())["error"]["message"]
        for name in ("Authorization", "X-Request-Id", "traceparent"):
            assert (await post(session, BODY, headers={name: "Bearer \u00fc\u20ac"}))[0] == 200

    bodies: list[bytes] = [b"[" * 100_000, b'{"model": "\xff"}', b'{"model": "\\ud800", "messages": [{"role": "user", "content": "\\udfff"}]}']

    @settings(max_examples=40)
    @given(st.binary(max_size=40), JSON, st.sampled_from(["model", "messages", "n", "seed", "stop", "deadline_s", "stream_options", "temperature"]))
    def collect(raw, value, field):
        bodies.extend((raw, json.dumps({**BODY, field: value}).encode()))

    collect()
    serve(use)


@pytest.mark.parametrize("host, tls, url", [("127.0.0.1", None, "127.0.0.1:8001"), ("0.0.0.0", Tls("cert", "key"), "grpcs://127.0.0.1:8001")])
def test_beside_a_server_it_is_started_anew_when_it_ends_and_goes_with_it(tmp_path, monkeypatch, host, tls, url):
    program, said = tmp_path / "program", []
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path / "words"}.new && mv {tmp_path / "words"}.new {tmp_path / "words"} && exec sleep 60\n')
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr("sun_client.supervisor.BACKOFF_S", (0.0,))
    beside = child.GatewayProcess(Server(tmp_path, host=host, tls=tls), 8080, said.append)
    beside.look()
    assert beside.pid is None and beside.url.startswith("https" if tls else "http:")
    try:
        beside.start()
        eventually((tmp_path / "words").exists)
        words = (tmp_path / "words").read_text()
        assert f"gateway --host {host} --port 8080 --url {url}" in words and ("--tls-cert cert --tls-key key" in words) == bool(tls)
        first = beside.pid
        beside.look()
        assert beside.pid == first and not said
        os.kill(first, signal.SIGKILL)

        def anew() -> bool:
            beside.look()
            return beside.pid != first

        eventually(anew)
        assert len(said) == 1 and "code -9" in said[0]
        os.kill(beside.pid, 0)
    finally:
        beside.terminate()
        beside.end()
    with pytest.raises(ProcessLookupError):
        os.kill(beside.pid, 0)
