"""A TCP proxy on a bad network: connections are slow, cut, corrupted, or left half open."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

CHUNK = 2**14


@dataclass(frozen=True)
class Weather:
    """What becomes of one connection. Bytes are counted in one direction, from its beginning.

    Attributes:
        latency: seconds by which every piece is late.
        reset: the connection is reset after so many bytes.
        flip: one bit of that byte is another.
        silent: nothing arrives after so many bytes, and nobody is told.
        answers: the fault is in what comes back; else in what is sent.
    """

    latency: float = 0.0
    reset: int | None = None
    flip: int | None = None
    silent: int | None = None
    answers: bool = False


class Reset(Exception):
    """The connection ends here, without a farewell."""


class Proxy:
    """Hands connections on to a server on this machine.

    Args:
        upstream: its port.
        weather: of the n-th connection, from 0.
    """

    def __init__(self, upstream: int, weather: Callable[[int], Weather]) -> None:
        self._upstream, self._weather = upstream, weather
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        weather = self._weather(self.connections)
        self.connections += 1
        try:
            back, forth = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:
            writer.close()
            return
        calm = Weather(latency=weather.latency)
        there, here = (calm, weather) if weather.answers else (weather, calm)
        pumps = [
            asyncio.ensure_future(_pump(reader, forth, there)),
            asyncio.ensure_future(_pump(back, writer, here)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if any(p.done() and isinstance(p.exception(), Reset) for p in pumps):
                for end in (forth, writer):
                    _abort(end)
        finally:
            for pump in pumps:
                pump.cancel()
            for end in (forth, writer):
                with suppress(OSError, RuntimeError):
                    end.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, w: Weather) -> None:
    passed = 0
    while data := await reader.read(CHUNK):
        if w.latency:
            await asyncio.sleep(w.latency)
        end = passed + len(data)
        if w.flip is not None and passed <= w.flip < end:
            spoilt = bytearray(data)
            spoilt[w.flip - passed] ^= 1
            data = bytes(spoilt)
        if w.reset is not None and end > w.reset:
            writer.write(data[: w.reset - passed])
            raise Reset
        if w.silent is not None and end > w.silent:
            await asyncio.sleep(3600)
        passed = end
        writer.write(data)
        await writer.drain()


def _abort(writer: asyncio.StreamWriter) -> None:
    """Reset instead of close."""
    raw: socket.socket | None = writer.get_extra_info("socket")
    with suppress(OSError):
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextmanager
def running(upstream: int, weather: Callable[[int], Weather]) -> Iterator[tuple[int, Proxy]]:
    """A proxy in a thread of its own; its port."""
    loop, made = asyncio.new_event_loop(), Proxy(upstream, weather)
    server = loop.run_until_complete(asyncio.start_server(made.serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1], made
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


async def _end(server: asyncio.Server) -> None:
    """Close every connection, the silent ones too."""
    server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
