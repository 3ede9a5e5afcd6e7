"""The fleet's door: what devices may do passes, everything else is refused before it costs much."""

from __future__ import annotations

import asyncio
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fedsim.deploy import proxy
from fedsim.deploy.keys import Certificates, certificates
from fedsim.deploy.loopback import free_port, listening

LIMIT = 2**20


class SuperLink(BaseHTTPRequestHandler):
    """Notes what reaches it."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, int]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.seen.append((self.path, len(body)))
        answer = body[:10] + self.headers.get("x-signature", "").encode()
        self.send_response(200)
        if self.path.endswith("chunked"):
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for part in (answer[:3], answer[3:], b""):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            return
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_DELETE = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("tls"))


@contextmanager
def superlink(tls: Certificates) -> Iterator[tuple[int, list[tuple[str, int]]]]:
    handler = type("Handler", (SuperLink,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.certificate, tls.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1], handler.seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def door(tls: Certificates) -> Iterator[tuple[int, list[tuple[str, int]]]]:
    with superlink(tls) as (inner, seen):
        port, loop = free_port(), asyncio.new_event_loop()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(tls.certificate, tls.key)
        trust = ssl.create_default_context(cafile=tls.authority)
        made = proxy.Door(("127.0.0.1", inner), trust, LIMIT, max_connections=20)
        task = loop.create_task(proxy.run(("127.0.0.1", port), made, context))
        threading.Thread(
            target=lambda: loop.run_until_complete(_quietly(task)), daemon=True
        ).start()
        while not listening(port):
            time.sleep(0.01)
        yield port, seen
        loop.call_soon_threadsafe(task.cancel)


async def _quietly(task: asyncio.Task[None]) -> None:
    with suppress(asyncio.CancelledError):
        await task


def connection(port: int, tls: Certificates) -> http.client.HTTPSConnection:
    trust = ssl.create_default_context(cafile=tls.authority)
    return http.client.HTTPSConnection("127.0.0.1", port, context=trust, timeout=10)


def ask(port: int, tls: Certificates, path: str, body: bytes = b"", method: str = "POST") -> int:
    link = connection(port, tls)
    link.request(method, path, body)
    return link.getresponse().status


def test_devices_get_through(door: Any, tls: Certificates) -> None:
    port, seen = door
    link = connection(port, tls)
    for path in ("/v1/fleet/pull-messages", "/v1/fleet/chunked", "/v1/fleet/push-object"):
        link.request("POST", path, b"x" * 100_000, {"x-signature": "signed"})
        assert link.getresponse().read() == b"x" * 10 + b"signed"
    assert [path.rsplit("/")[-1] for path, _ in seen] == ["pull-messages", "chunked", "push-object"]


@pytest.mark.parametrize(
    "path",
    ["/v1/control/start-run", "/v1/runtime/push-object", "/docs", "/", "/v1/fleet/../control/x",
     "/v1/fleet/%2e%2e/control/x", "/v1/fleet//x", "/v1/fleetx", "//v1/fleet/x",
     "http://127.0.0.1/v1/control/start-run"],
)  # fmt: skip
def test_the_control_path_is_not_for_devices(path: str, door: Any, tls: Certificates) -> None:
    port, seen = door
    assert ask(port, tls, path) == 403
    assert seen == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_only_posts(method: str, door: Any, tls: Certificates) -> None:
    assert ask(door[0], tls, "/v1/fleet/pull-messages", method=method) == 405


def raw(port: int, tls: Certificates, data: bytes) -> bytes:
    trust = ssl.create_default_context(cafile=tls.authority)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        trust.wrap_socket(plain, server_hostname="127.0.0.1") as link,
    ):
        link.sendall(data)
        return link.recv(1000)


BIG = b"POST /v1/fleet/push-object HTTP/1.1\r\ncontent-length: 300000000\r\n\r\n"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (BIG, 413),
        (b"POST /v1/fleet/x HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", 411),
        (b"POST /v1/fleet/x HTTP/1.1\r\n\r\n", 411),
        (b"POST /v1/fleet/x HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (b"POST /v1/fleet/x HTTP/1.1\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST /v1/fleet/x HTTP/1.1\r\ncontent-length : 1\r\n\r\n", 400),
        (b"POST /v1/fleet/x HTTP/1.0\r\ncontent-length: 1\r\n\r\n", 400),
        (b"POST /v1/fleet/x HTTP/1.1\r\nx: " + b"y" * 20_000 + b"\r\n\r\n", 431),
        (b"\xff\xfe\r\n\r\n", 400),
    ],
)
def test_refused_before_a_body_is_read(
    request_: bytes, status: int, door: Any, tls: Certificates
) -> None:
    port, seen = door
    assert raw(port, tls, request_).split()[1] == str(status).encode()
    assert seen == []


def test_plaintext_and_strangers_certificates(door: Any, tmp_path: Path) -> None:
    port, _ = door
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        plain.sendall(b"POST /v1/fleet/x HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
        assert not plain.recv(100).startswith(b"HTTP")
    other = certificates(tmp_path / "other")
    with pytest.raises(ssl.SSLError):
        ask(port, other, "/v1/fleet/pull-messages")


def test_many_connections_leave_room_for_none_too_many(door: Any, tls: Certificates) -> None:
    port, _ = door
    trust = ssl.create_default_context(cafile=tls.authority)
    held = []
    for _ in range(20):
        plain = socket.create_connection(("127.0.0.1", port), timeout=10)
        held.append(trust.wrap_socket(plain, server_hostname="127.0.0.1"))
    assert ask(port, tls, "/v1/fleet/pull-messages") == 503
    for link in held:
        link.close()
    time.sleep(0.2)
    assert ask(port, tls, "/v1/fleet/pull-messages") == 200


def test_a_slow_client_is_cut_off(
    door: Any, tls: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "PATIENCE", 0.2)
    assert raw(door[0], tls, b"POST /v1/fle").split()[1] == b"408"


def test_without_a_superlink(tls: Certificates) -> None:
    async def scene() -> int:
        door = proxy.Door(("127.0.0.1", free_port()), None)
        server = await asyncio.start_server(door.serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"POST /v1/fleet/x HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
        line = await reader.readline()
        server.close()
        return int(line.split()[1])

    assert asyncio.run(scene()) == 502


def test_planted_trust_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check the control path is open: this is what the tests above rely on."""
    head = proxy.Head.of(b"POST /v1/control/start-run HTTP/1.1\r\ncontent-length: 1\r\n\r\n")
    with pytest.raises(proxy.Refused):
        proxy.check(head)
    monkeypatch.setattr(proxy, "ALLOWED", "/")
    proxy.check(head)


def test_certificates_are_kept_and_grow(tmp_path: Path) -> None:
    first = certificates(tmp_path).authority.read_bytes()
    assert certificates(tmp_path).authority.read_bytes() == first
    assert certificates(tmp_path, ["fl.example.org"]).authority.read_bytes() != first
    kept = certificates(tmp_path).authority.read_bytes()
    assert certificates(tmp_path, ["fl.example.org"]).authority.read_bytes() == kept
    assert (tmp_path / "server.key").stat().st_mode & 0o777 == 0o600
