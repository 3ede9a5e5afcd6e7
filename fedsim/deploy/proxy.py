"""The only door for devices: TLS, the fleet's paths, and nothing big before it is known who asks.

Flower's SuperLink serves everything on one port: what devices need, and what starts programs on
all of them. So it is bound to the loopback address, and this program stands between: it ends the
devices' TLS, lets through ``/v1/fleet/`` and nothing else, refuses a body that is too big by its
declared length, before it reads one, and hands the rest on to the SuperLink, over TLS again. Who a
device is, the SuperLink finds out from its signature, which is passed on.
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
from asyncio import sslproto
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from fedsim.deploy.main import address

ALLOWED = "/v1/fleet/"
MAX_BODY = 8 * 2**20
"""Bytes of a request. Flower cuts arrays into pieces of 5 MB."""
MAX_HEAD = 16 * 2**10
MAX_CONNECTIONS = 512
PATIENCE = 30.0
"""Seconds for the head of a request, and between two parts of a body."""
IDLE = 120.0
"""Seconds that a connection may wait for its next request."""
CHUNK = 2**16
TLS_BUFFER = 2**15
"""Bytes that a connection takes for TLS; Python's default of 256 KiB is a lot for 500 of them."""

REASONS = {
    400: "Bad Request", 403: "Forbidden", 405: "Method Not Allowed", 408: "Request Timeout",
    411: "Length Required", 413: "Content Too Large", 431: "Request Header Fields Too Large",
    502: "Bad Gateway", 503: "Service Unavailable",
}  # fmt: skip


class Refused(Exception):
    """A request that is not passed on; the argument is the HTTP status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@dataclass(frozen=True)
class Head:
    """The head of a request or reply.

    Attributes:
        raw: its bytes, with the empty line at the end.
        first: the first line, split at spaces.
        headers: by lower-case name.
    """

    raw: bytes
    first: tuple[str, ...]
    headers: dict[str, str]

    @staticmethod
    def of(raw: bytes) -> Head:
        """Parse a head. Raises `Refused` if it is ambiguous."""
        try:
            lines = raw.decode("ascii").split("\r\n")[:-2]
            pairs = [line.split(":", 1) for line in lines[1:]]
            named = [(name.lower(), value.strip()) for name, value in pairs]
        except (UnicodeDecodeError, ValueError):
            raise Refused(400) from None
        headers = dict(named)
        first = tuple(lines[0].split(" "))
        if len(first) < 3 or len(headers) < len(named) or any(n != n.strip() for n, _ in named):
            raise Refused(400)
        return Head(raw, first, headers)

    @property
    def length(self) -> int:
        """Declared length of the body."""
        value = self.headers.get("content-length", "0")
        if not (value.isascii() and value.isdigit()):
            raise Refused(400)
        return int(value)

    @property
    def ends(self) -> bool:
        """Whether the connection ends after this."""
        return self.headers.get("connection", "").lower() == "close"


def check(head: Head, max_body: int = MAX_BODY) -> None:
    """Raise `Refused` unless a request is one that a device may make."""
    method, path, version = head.first[:3]
    if len(head.first) != 3 or version != "HTTP/1.1":
        raise Refused(400)
    if not path.startswith(ALLOWED) or ".." in path or "%" in path or "//" in path:
        raise Refused(403)
    if method != "POST":
        raise Refused(405)
    if "transfer-encoding" in head.headers or "content-length" not in head.headers:
        raise Refused(411)
    if head.length > max_body:
        raise Refused(413)


class Door:
    """The server.

    Args:
        upstream: host and port of the SuperLink.
        trust: TLS towards the SuperLink; None: none.
        max_body: most bytes of a request.
        max_connections: most connections at a time.
    """

    def __init__(
        self,
        upstream: tuple[str, int],
        trust: ssl.SSLContext | None,
        max_body: int = MAX_BODY,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._upstream, self._trust, self._max_body = upstream, trust, max_body
        self._free = max_connections

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a device."""
        if self._free <= 0:
            await _refuse(writer, 503)
            return
        self._free -= 1
        try:
            await self._requests(reader, writer)
        except Refused as refused:
            with suppress(OSError):
                await _refuse(writer, refused.status)
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            pass
        finally:
            self._free += 1
            writer.close()

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (head := await _head(reader, IDLE)) is not None:
            check(head, self._max_body)
            # A connection for each: the SuperLink ends idle ones, and a request must not be lost.
            back, forth = await self._connect()
            try:
                forth.write(head.raw)
                await _copy(reader, forth, head.length)
                answer = await _head(back, None)
                if answer is None:
                    raise Refused(502)
                writer.write(answer.raw)
                await _answer(answer, back, writer)
            finally:
                forth.close()
            if head.ends or answer.ends:
                return

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = self._upstream
        try:
            return await asyncio.open_connection(host, port, ssl=self._trust, limit=MAX_HEAD)
        except OSError:
            raise Refused(502) from None


async def _head(reader: asyncio.StreamReader, idle: float | None) -> Head | None:
    """The next head; None if the connection ends before it."""
    try:
        async with asyncio.timeout(idle):
            start = await reader.read(1)
        if not start:
            return None
        async with asyncio.timeout(PATIENCE):
            return Head.of(start + await reader.readuntil(b"\r\n\r\n"))
    except asyncio.LimitOverrunError:
        raise Refused(431) from None
    except TimeoutError:
        raise Refused(408) from None


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, length: int) -> None:
    """Hand on so many bytes."""
    while length:
        async with asyncio.timeout(PATIENCE):
            data = await reader.read(min(length, CHUNK))
        if not data:
            raise asyncio.IncompleteReadError(b"", length)
        writer.write(data)
        length -= len(data)
        await writer.drain()
    await writer.drain()


async def _answer(head: Head, back: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hand on the body of a reply, in whatever way its length is given."""
    if head.headers.get("transfer-encoding", "").lower() == "chunked":
        while True:
            line = await back.readuntil(b"\r\n")
            writer.write(line)
            size = int(line.split(b";")[0], 16)
            await _copy(back, writer, size + 2)
            if not size:
                return
    await _copy(back, writer, head.length)


async def _refuse(writer: asyncio.StreamWriter, status: int) -> None:
    text = f"HTTP/1.1 {status} {REASONS[status]}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    writer.write(text.encode())
    await writer.drain()
    writer.close()


async def run(listen: tuple[str, int], door: Door, context: ssl.SSLContext) -> None:
    """Serve for ever."""
    sslproto.SSLProtocol.max_size = TLS_BUFFER
    server = await asyncio.start_server(
        door.serve, *listen, ssl=context, limit=MAX_HEAD, ssl_handshake_timeout=PATIENCE
    )
    async with server:
        await server.serve_forever()


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m fedsim.deploy.proxy``: see the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", type=address, required=True, metavar="HOST:PORT")
    parser.add_argument("--superlink", type=address, required=True, metavar="HOST:PORT")
    parser.add_argument("--certificate", required=True, help="of this server, PEM")
    parser.add_argument("--key", required=True, help="its private key, PEM")
    parser.add_argument("--authority", required=True, help="vouches for the SuperLink, PEM")
    parser.add_argument("--max-body", type=int, default=MAX_BODY, help="bytes of a request")
    given = parser.parse_args(arguments)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(given.certificate, given.key)
    trust = ssl.create_default_context(cafile=given.authority)
    asyncio.run(run(given.listen, Door(given.superlink, trust, given.max_body), context))


if __name__ == "__main__":
    main()
