"""What strangers cost the fleet's door: the real process, its memory, the time it takes others."""

from __future__ import annotations

import socket
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from fedsim.deploy.keys import Certificates, certificates
from fedsim.deploy.loopback import free_port, listening
from fedsim.deploy.processes import Group
from tests.deploy.support import until

MOST = 32 * 2**10
"""KiB by which the door may grow."""


class Running:
    """A door in a process of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.tls: Certificates = certificates(folder / "tls")
        self.port, self.group = free_port(), Group(folder)
        self.process = self.group.start(
            "door",
            [
                *(
                    sys.executable,
                    "-m",
                    "fedsim.deploy.proxy",
                    "--listen",
                    f"127.0.0.1:{self.port}",
                ),
                *(
                    "--superlink",
                    f"127.0.0.1:{free_port()}",
                    "--authority",
                    str(self.tls.authority),
                ),
                *("--certificate", str(self.tls.certificate), "--key", str(self.tls.key)),
                *options,
            ],
        )
        self.trust = ssl.create_default_context(cafile=self.tls.authority)
        assert until(lambda: listening(self.port), 30)

    def connect(self) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        return self.trust.wrap_socket(plain, server_hostname="127.0.0.1")

    def kib(self) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):  # the most it ever had
                return int(line.split()[1])
        raise AssertionError("no such process")

    def status(self, head: bytes) -> int:
        with self.connect() as link:
            link.sendall(head)
            return int(link.recv(100).split()[1])


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path)
    with made.group:
        yield made


BIG = b"POST /v1/fleet/push-object HTTP/1.1\r\ncontent-length: 300000000\r\n\r\n"
SMALL = b"POST /v1/fleet/x HTTP/1.1\r\ncontent-length: 0\r\n\r\n"
NOBODY = 502
"""What a device hears from a door without a SuperLink: it was let through."""


def test_bodies_of_300_megabytes(door: Running) -> None:
    """Ten at once, from nobody in particular: refused before a byte of them is read."""
    assert door.status(SMALL) == NOBODY
    before = door.kib()
    with ExitStack() as stack:
        links = [stack.enter_context(door.connect()) for _ in range(10)]
        for link in links:
            link.sendall(BIG)
        assert [int(link.recv(100).split()[1]) for link in links] == [413] * 10
        for link in links:  # they send on, whatever the door says
            with suppress(OSError):
                link.sendall(b"x" * 2**24)
    assert door.kib() - before < MOST
    assert door.status(SMALL) == NOBODY


def test_connections_that_say_nothing(door: Running) -> None:
    """Three hundred half heads: others are served, at once."""
    before = door.kib()
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(door.connect()).sendall(b"POST /v1/fleet/x HT")
        start = time.monotonic()
        assert door.status(SMALL) == NOBODY
        assert time.monotonic() - start < 1
        grown = door.kib() - before
    print(f"300 slow connections: {grown / 1024:.1f} MiB")
    assert grown < MOST


def test_planted_hospitality_is_found(tmp_path: Path) -> None:
    """With a limit above what they declare, big bodies are no longer refused."""
    made = Running(tmp_path, "--max-body", "1000000000")
    with made.group:
        assert made.status(BIG) == NOBODY
