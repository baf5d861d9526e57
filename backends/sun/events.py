"""A decode worker's events on their way to the routers, over a Unix socket.

Not as a streamed call of Triton's: one that is open when its process dies never ends. It keeps the dead model's instance in tritonserver,
with 35 threads, and the caller's thread for ever (24.10).

The socket is in Linux's abstract namespace, named after the worker's pid, and lets in children of the worker's own tritonserver alone. A
connection: the router's name, then one message for each `StepEvents`, and an empty one at the end. One without it broke off.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener

from sun.decode.outbox import Outbox
from sun.messages import StepEvents, decode_reply, encode
from sun.stubs import stat

END = b""
BACKLOG = 16
RETRY_S = 0.1


class EventServer:
    """Sends what routers ask for from an outbox, each in a thread of its own, until it is closed."""

    def __init__(self, outbox: Outbox):
        self._outbox = outbox
        self._closed = threading.Event()
        self._listener = Listener(_address(os.getpid()), "AF_UNIX", BACKLOG)
        self._accepting = threading.Thread(target=self._accept, name="events", daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Let nobody in any more, and break off the connections that there are before their next message."""
        self._closed.set()
        with contextlib.suppress(OSError):
            Client(_address(os.getpid()), "AF_UNIX").close()  # for `accept` to return: the address is in use as long as it waits
            self._accepting.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection = self._listener.accept()
            except OSError:  # no more files, say
                self._closed.wait(RETRY_S)
            else:
                threading.Thread(target=self._serve, args=(connection,), name="events-to", daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        # The router may leave at any time.
        with connection, contextlib.suppress(OSError, EOFError):
            seen = stat(_peer(connection))
            if seen is None or seen.parent != os.getppid():
                return
            with contextlib.closing(self._outbox.listen(connection.recv_bytes().decode())) as listening:
                for steps in listening:
                    for step in steps:
                        if self._closed.is_set():
                            return
                        connection.send_bytes(encode(step))
            if not self._closed.is_set():
                connection.send_bytes(END)


def hear(pid: int, router: str) -> Iterator[StepEvents]:
    """The steps of the worker whose process is ``pid``, for this router, until it has no sequence left there.

    Raises OSError or EOFError if there is no such process, or it ends or closes meanwhile.
    """
    with Client(_address(pid), "AF_UNIX") as connection:
        if _peer(connection) != pid:
            raise ConnectionRefusedError(f"another process answers for {pid}")
        connection.send_bytes(router.encode())
        while message := connection.recv_bytes():
            yield decode_reply(message)


def _address(pid: int) -> str:
    return f"\0sun-events-{pid}"


def _peer(connection: Connection) -> int:
    """The pid on the other end."""
    with socket.socket(fileno=os.dup(connection.fileno())) as other:
        return struct.unpack("3i", other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
