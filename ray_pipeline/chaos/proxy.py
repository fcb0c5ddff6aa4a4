"""A TCP proxy whose links can be slow, cut, or half open: a broker that advertises its port is reached only through it."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType

__all__ = ["FaultProxy"]

_CHUNK = 65_536


class FaultProxy:
    """Passes connections on to a port of this machine. A context manager.

    Args:
        target_port: where to, on 127.0.0.1.

    Attributes:
        port: where it listens, on 127.0.0.1.
        delay_s: how long each piece of data is held back, seconds.
        half_open: whether data is held back until this is set to False again, with all connections open.
        connections: how many have been made.
    """

    def __init__(self, target_port: int) -> None:
        self.port = 0
        self.delay_s = 0.0
        self.half_open = False
        self.connections = 0
        self._target_port = target_port
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)

    def __enter__(self) -> FaultProxy:
        """Begin to listen."""
        self._thread.start()
        self._up.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cut what is open and end."""
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def cut(self) -> None:
        """Break every connection, in the middle of whatever passes; new ones may be made at once."""

        def now() -> None:
            for writer in self._writers:
                writer.transport.abort()

        self._loop.call_soon_threadsafe(now)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._up.set()
        self._loop.run_forever()
        server.close()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            onward = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(self._pass(reader, onward[1]), self._pass(onward[0], writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while data := await reader.read(_CHUNK):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                while self.half_open:
                    await asyncio.sleep(0.01)
                writer.write(data)
                await writer.drain()
            writer.close()
        except OSError:  # the one side is gone, so the other goes too
            writer.transport.abort()
        finally:
            self._writers.discard(writer)
