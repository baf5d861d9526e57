"""The gateway's endpoints, as an aiohttp application."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import msgspec
from aiohttp import web

from sun_client import wire
from sun_client.errors import SunError
from sun_client.gateway.answers import Answer
from sun_client.gateway.chat import ChatRequest, parse
from sun_client.gateway.errors import BROKEN, ApiError, api_error
from sun_client.gateway.upstream import Upstream, merged
from sun_client.wire import Piece

log = logging.getLogger("sun.gateway")
BODY_BYTES = 2 << 20
"""Twice what the router takes of messages: JSON may spell a character longer than it is."""
SLOW_S = 30.0
"""A body must be here, and a client must have taken what was written to it, within this time."""
LAST_S = 2.0
"""For the last words to those whose requests are ended."""
MODULE_S = 30.0
"""How old the decode module's name may be that answers carry."""
CLOSING = (408, 413)
"""After these the rest of a body may be on its way."""
REQUEST_ID = re.compile(r"[\w.:-]{1,100}", re.ASCII)
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[ -~]{0,64})?")
NO_COMPLETIONS = "raw prompts are not served: the chat template makes every prompt here; use /v1/chat/completions"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gateway:
    """OpenAI's API in front of a Triton server. One asyncio task a request, which ends with its client's connection.

    stopping: set it to refuse new requests. `end` then ends those in flight.
    """

    def __init__(self, upstream: Upstream):
        self._upstream, self._started = upstream, int(time.time())
        self.stopping = False
        self._inflight: set[asyncio.Task] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._over = False
        self._module: str | None = None
        self._module_at = float("-inf")
        self._background: set[asyncio.Task] = set()

    def application(self) -> web.Application:
        """The application. Its clean-up closes the upstream's connection."""
        app = web.Application(middlewares=[self._guard], client_max_size=BODY_BYTES)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model}", self._model)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/health", self._health)
        app.on_startup.append(self._begin)
        app.on_cleanup.append(self._close)
        return app

    async def drained(self) -> None:
        """Return when no request is in flight."""
        await self._quiet.wait()

    async def end(self) -> None:
        """End the requests in flight; their clients are told why."""
        self._over = True
        for task in self._inflight:
            task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_S):
                await self.drained()

    async def _begin(self, app: web.Application) -> None:
        self._fingerprint()

    async def _close(self, app: web.Application) -> None:
        for task in self._background:
            task.cancel()
        await self._upstream.close()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Whatever goes wrong becomes an error in OpenAI's form."""
        task = asyncio.current_task()
        assert task is not None
        self._inflight.add(task)
        self._quiet.clear()
        try:
            response = _refusal(_stopping()) if self.stopping else await handler(request)
        except asyncio.CancelledError:
            if not self._over:
                raise
            task.uncancel()
            response = _refusal(_stopping())
        except ApiError as error:
            response = _refusal(error)
        except SunError as error:
            response = _refusal(api_error(error))
        except web.HTTPRequestEntityTooLarge:
            response = _refusal(ApiError(413, f"the body is over the limit of {BODY_BYTES} bytes", code="body_too_large"))
        except web.HTTPException as error:
            response = _refusal(ApiError(error.status, f"{request.method} {request.path[:200]}: {error.reason}", code="unknown_url"))
        except Exception:
            log.exception("a request failed")
            response = _refusal(_failed())
        finally:
            self._inflight.discard(task)
            if not self._inflight:
                self._quiet.set()
        if self.stopping or response.status in CLOSING:
            response.force_close()
        return response

    async def _models(self, request: web.Request) -> web.Response:
        return _json({"object": "list", "data": [self._card(task) for task in await self._upstream.tasks()]})

    async def _model(self, request: web.Request) -> web.Response:
        task = request.match_info["model"]
        if task not in (tasks := await self._upstream.tasks()):
            raise ApiError(404, f"model: {task[:64]!r} is not known; the models here are {', '.join(tasks)}", param="model", code="model_not_found")
        return _json(self._card(task))

    def _card(self, task: str) -> dict:
        return {"id": task, "object": "model", "created": self._started, "owned_by": "sun"}

    async def _completions(self, request: web.Request) -> web.Response:
        raise ApiError(404, NO_COMPLETIONS, code="unsupported_endpoint")

    async def _health(self, request: web.Request) -> web.Response:
        if not await self._upstream.healthy():
            raise ApiError(503, f"no server, or no decode worker, answers at {self._upstream.url}", BROKEN, code="unavailable")
        return _json({"status": "ok"})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = parse(await _body(request))
        given = request.headers.get("X-Request-Id", "")
        answer = Answer(asked, f"chatcmpl-{given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex}", self._fingerprint())
        try:
            async with aclosing(merged([self._upstream.pieces(r) for r in _requests(asked, answer.id, request)])) as pieces:
                if asked.stream:
                    return await self._stream(request, answer, pieces)
                async for index, piece in pieces:
                    answer.add(index, piece)
        except SunError as error:
            raise api_error(error, asked.renamed) from error
        return _json(answer.whole(), headers={"X-Request-Id": answer.id})

    async def _stream(self, request: web.Request, answer: Answer, pieces: AsyncIterator[tuple[int, Piece]]) -> web.StreamResponse:
        index, piece = await anext(pieces)  # before the status: until here an error has one of its own
        response = web.StreamResponse(headers={
            "Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no", "X-Request-Id": answer.id})
        await response.prepare(request)
        last: ApiError | None = None
        try:
            await _send(request, response, answer.chunks(index, piece))
            async for index, piece in pieces:
                await _send(request, response, answer.chunks(index, piece))
            await _send(request, response, answer.last(), b"data: [DONE]\n\n")
        except ConnectionError:
            return response  # the client is gone
        except SunError as error:
            last = api_error(error, answer.request.renamed)
        except asyncio.CancelledError:
            if not self._over:
                raise
            asyncio.current_task().uncancel()
            last = _stopping()
        except Exception:
            log.exception("a stream failed")
            last = _failed()
        with contextlib.suppress(ConnectionError):
            if last is not None:
                await _send(request, response, [last.body()])
            await response.write_eof()
        return response

    def _fingerprint(self) -> str | None:
        """The decode module's name as it was known last; it is asked for anew beside the request, which never waits for it."""
        if time.monotonic() - self._module_at > MODULE_S:
            self._module_at = time.monotonic()
            task = asyncio.ensure_future(self._look())
            self._background.add(task)
            task.add_done_callback(self._background.discard)
        return self._module

    async def _look(self) -> None:
        try:
            module = await self._upstream.module()
        except SunError:
            module = None
        self._module = module and "-".join(word[:19] for word in module.split())


async def _body(request: web.Request) -> object:
    """The request's JSON. Raises ApiError; what reads it raises HTTPRequestEntityTooLarge."""
    try:
        async with asyncio.timeout(SLOW_S):
            return msgspec.json.decode(await request.read())
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {SLOW_S:g} s", code="timeout") from None
    except web.RequestPayloadError as error:
        raise ApiError(400, f"body: {error}", param="body") from error
    except (ValueError, RecursionError) as error:  # of msgspec's a DecodeError is a ValueError
        raise ApiError(400, f"body: malformed JSON: {error}", param="body") from error


def _requests(asked: ChatRequest, id: str, request: web.Request) -> list:
    """What `sun` is asked, one a choice."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    traceparent = request.headers.get("traceparent", "")
    parameters = {
        # A header may be no text; no key is any such.
        "api_key": key.strip().encode(errors="replace").decode() if scheme.lower() == "bearer" else "",
        "traceparent": traceparent if TRACEPARENT.fullmatch(traceparent) else "", **asked.parameters}
    return [wire.generate_request(asked.task, None, asked.messages, asked.choice(index), asked.stream,
                                  id if asked.n == 1 else f"{id}-{index}", parameters) for index in range(asked.n)]


async def _send(request: web.Request, response: web.StreamResponse, events: list[dict], more: bytes = b"") -> None:
    """Write server-sent events in one go, at the client's pace. One that takes nothing loses its connection (ConnectionResetError)."""
    data = b"".join(b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events) + more
    if not data:
        return
    try:
        async with asyncio.timeout(SLOW_S):
            await response.write(data)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the client does not read") from None


def _json(value: dict, status: int = 200, headers: dict[str, str] = {}) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json", headers=headers)


def _refusal(error: ApiError) -> web.Response:
    return _json(error.body(), error.status, error.headers)


def _stopping() -> ApiError:
    return ApiError(503, "the gateway is shutting down", BROKEN, code="unavailable")


def _failed() -> ApiError:
    return ApiError(500, "the gateway failed; its log says why", BROKEN, code="internal_error")
