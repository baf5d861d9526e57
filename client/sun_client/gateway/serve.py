"""The gateway as a process: it listens until SIGTERM, and then lets what has begun end."""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from sun_client.gateway.app import Gateway
from sun_client.gateway.upstream import Upstream

GRACE_S = 30.0
"""As Triton's own for its streams."""
CONNECTIONS = 512
"""Open connections, twice as many as the router lets requests in by default."""
IDLE_S = 75.0
"""A connection without a request is closed after so long."""
FULL = (b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s")
FULL_BODY = b'{"error":{"message":"too many connections are open","type":"server_error","param":null,"code":"too_many_connections"}}'


class Refusal(asyncio.Protocol):
    """A connection that is one too many: it is told so and closed."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(FULL % (len(FULL_BODY), FULL_BODY))
        transport.close()


class Door:
    """A listening gateway. Start it where an event loop runs."""

    def __init__(self, upstream: Upstream, host: str, port: int, tls: ssl.SSLContext | None = None, connections: int = CONNECTIONS):
        """port: 0 for any that is free. connections: the most that may be open."""
        self._gateway, self._host, self._port, self._tls, self._most = Gateway(upstream), host, port, tls, connections
        self._runner = web.AppRunner(self._gateway.application(), handler_cancellation=True, access_log=None, keepalive_timeout=IDLE_S, shutdown_timeout=1.0)

    async def start(self) -> int:
        """Listen; the port. Raises OSError if it cannot."""
        await self._runner.setup()
        server = self._runner.server
        assert server is not None
        try:
            self._listener = await asyncio.get_running_loop().create_server(
                lambda: server() if len(server.connections) < self._most else Refusal(), self._host, self._port, ssl=self._tls)
        except OSError:
            await self._runner.cleanup()
            raise
        return self._listener.sockets[0].getsockname()[1]

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """Take no more requests, give those in flight ``grace_s`` seconds, end them, and close all connections."""
        self._gateway.stopping = True
        self._listener.close()
        try:
            async with asyncio.timeout(grace_s):
                await self._gateway.drained()
        except TimeoutError:
            await self._gateway.end()
        await self._runner.cleanup()


def context(certificate: Path, key: Path) -> ssl.SSLContext:
    """A server's TLS with PEM files. Raises ValueError naming what is wrong."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        made.load_cert_chain(certificate, key)
    except OSError as error:  # an SSLError is one
        raise ValueError(f"tls-cert and tls-key: {certificate} and {key}: {error.strerror or error}") from error
    return made


async def serve(url: str, host: str, port: int, tls: ssl.SSLContext | None, grace_s: float, connections: int, say: Callable[[int], None]) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends what is in flight at once. ``say(port)`` is called when it listens."""
    loop, told = asyncio.get_running_loop(), asyncio.Queue[int]()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, told.put_nowait, number)
    door = Door(Upstream(url), host, port, tls, connections)
    say(await door.start())
    await told.get()
    stopping = asyncio.ensure_future(door.stop(grace_s))
    again = asyncio.ensure_future(told.get())
    await asyncio.wait((stopping, again), return_when=asyncio.FIRST_COMPLETED)
    if stopping.done():
        again.cancel()
        return await stopping
    stopping.cancel()
    await asyncio.gather(stopping, return_exceptions=True)
    await door.stop(0.0)
