"""The Triton server behind the gateway, over one gRPC connection of asyncio's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc

from sun_client import wire
from sun_client.errors import SunError
from sun_client.wire import Piece

AGAIN_MS = 1000
"""The longest pause before a lost connection is tried again; gRPC's own is two minutes."""
ALIVE_MS, ANSWERED_MS = 310_000, 20_000
"""How long a silent connection is believed in, and waited for then. Triton breaks off with who asks more often than every 300 s."""
LOOK_S = 5.0
"""For questions that a healthy server answers at once."""


class Upstream:
    """A connection to a Triton server; make it where an event loop runs. Nothing is sent before the first request, and it reconnects."""

    def __init__(self, url: str):
        """url: as for `SunClient`. Raises SunError if the file of authorities cannot be read."""
        self.url = url
        address, credentials = wire.target(url)
        options = [*wire.options(address), ("grpc.initial_reconnect_backoff_ms", AGAIN_MS // 4), ("grpc.max_reconnect_backoff_ms", AGAIN_MS),
                   ("grpc.keepalive_time_ms", ALIVE_MS), ("grpc.keepalive_timeout_ms", ANSWERED_MS)]
        self._channel = (grpc.aio.insecure_channel(address, options=options) if credentials is None
                         else grpc.aio.secure_channel(address, credentials, options=options))
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def close(self) -> None:
        """End the connection; requests in flight are cancelled."""
        await self._channel.close()

    async def tasks(self) -> list[str]:
        """The tasks that the server has ready, sorted. Raises SunError."""
        return sorted(name.removeprefix("prefill_") for name in await self._named("prefill_"))

    async def healthy(self) -> bool:
        """Whether the router is ready and a decode worker answers. Does not raise."""
        try:
            with wire.errors(self.url, LOOK_S):
                ready = await self._stub.ModelReady(service_pb2.ModelReadyRequest(name="sun"), timeout=LOOK_S)
            return ready.ready and await self.module() is not None
        except SunError:
            return False

    async def module(self) -> str | None:
        """The decode module's name, of whichever worker answers first; None if none does. Raises SunError if the server does not."""
        asked = [asyncio.ensure_future(self._module(worker)) for worker in await self._named("decode_")]
        try:
            for answer in asyncio.as_completed(asked):
                if (module := await answer) is not None:
                    return module
            return None
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def pieces(self, request: service_pb2.ModelInferRequest) -> AsyncIterator[Piece]:
        """An answer's pieces as they come. Closing the generator cancels the request. Raises SunError."""
        finished = False
        async with aclosing(self._call(request, None)) as results:
            async for result in results:
                piece = wire.read_piece(result)
                finished = finished or piece.finish_reason is not None
                yield piece
        if not finished:
            raise wire.cut_short(self.url)

    async def _module(self, worker: str) -> str | None:
        from sun.messages import NO_STEPS

        try:
            async with aclosing(self._call(wire.stats_request(worker, NO_STEPS), LOOK_S)) as results:
                return wire.read_stats([result async for result in results]).module
        except SunError:
            return None

    async def _named(self, prefix: str) -> list[str]:
        with wire.errors(self.url, LOOK_S):
            return wire.named(await self._stub.ModelStatistics(service_pb2.ModelStatisticsRequest(), timeout=LOOK_S), prefix)

    async def _call(self, request: service_pb2.ModelInferRequest, timeout: float | None) -> AsyncIterator[InferResult]:
        """See `SunClient._call`, of which this is asyncio's twin: errors are read to the end of the call before they are raised."""
        with wire.errors(self.url, timeout):
            call, error = self._stub.ModelStreamInfer(iter([request]), timeout=timeout), ""
            try:
                async for response in call:
                    error = error or response.error_message
                    if response.infer_response.outputs:
                        yield InferResult(response.infer_response)
            finally:
                call.cancel()
            if error:
                raise wire.server_error(error)


async def merged(streams: list[AsyncIterator[Piece]]) -> AsyncIterator[tuple[int, Piece]]:
    """Several answers' pieces as they come, each with its answer's index. The first error ends all."""
    if len(streams) == 1:  # no task of its own
        async with aclosing(streams[0]) as only:
            async for piece in only:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue(len(streams))

    async def pump(index: int, stream: AsyncIterator[Piece]) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    await queue.put((index, piece))
            await queue.put((index, None))
        except Exception as error:
            await queue.put((index, error))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
