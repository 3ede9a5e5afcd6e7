"""Rounds over real sockets, TLS and the door for devices, on a bad network.

The nodes are threads that fetch messages over HTTPS, as Flower's nodes do from a SuperLink, through
the proxy of `tests.faults.proxy` and the door of `fedsim.deploy.proxy`. What goes wrong they try
again, so that a reply may come twice.
"""

from __future__ import annotations

import asyncio
import http.client
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedsim.client_app import ProgramApp
from fedsim.core.packing import content_of, pack, tree_of, unpack
from fedsim.core.records import materialise
from fedsim.deploy.keys import Certificates
from fedsim.deploy.proxy import Door
from fedsim.intake import Intake
from fedsim.runtime import flower, remote
from fedsim.runtime.remote import RemoteGrid
from tests.contract import toy
from tests.contract.rows import Row
from tests.deploy import test_proxy
from tests.faults.post import Post
from tests.faults.proxy import Proxy, Weather, running

tls = test_proxy.tls
ROW, CLIENTS, PATIENCE = Row("scaffold"), len(toy.SIZES), 0.5
CALM = Weather()


class Mailbox(Post):
    """A Flower grid whose nodes fetch their messages."""

    def __init__(self, app: ProgramApp) -> None:
        super().__init__(app, CLIENTS)
        self.lock = threading.Lock()
        self.open: dict[str, tuple[Message, bytes]] = {}
        self.came: list[Message] = []
        self.past: dict[str, tuple[Message, bytes]] = {}
        self.pushed = 0

    def _serve(self, message: Message) -> None:
        meta = message.metadata
        said = {
            "id": meta.message_id,
            "type": meta.message_type,
            "content": tree_of(materialise(message.content)),
        }
        with self.lock:
            self.open[meta.message_id] = message, pack(said)

    def fetch(self, node: int) -> bytes:
        """A message for this node, until it is answered."""
        with self.lock:
            mine = (d for m, d in self.open.values() if m.metadata.dst_node_id == node)
            return next(mine, b"")

    def push(self, body: bytes) -> None:
        """A reply; it is not looked whether it came before."""
        said = unpack(body)
        with self.lock:
            self.pushed += 1
            asked = self.open.get(said["id"]) or self.past[said["id"]]
            self.past[said["id"]] = asked
            self.open.pop(said["id"], None)
            self.came.append(Message(content_of(said["content"]), reply_to=asked[0]))

    def pull_messages(self, message_ids: Any) -> list[Message]:
        """What has come in for these."""
        wanted = set(message_ids)
        with self.lock:
            there = [m for m in self.came if m.metadata.reply_to_message_id in wanted]
            self.came = [m for m in self.came if m.metadata.reply_to_message_id not in wanted]
        return there


class Handler(test_proxy.SuperLink):
    """The mailbox behind HTTP."""

    mailbox: Mailbox

    def do_POST(self) -> None:
        """Fetch or push."""
        body = self.rfile.read(int(self.headers["content-length"]))
        answer = b""
        if self.path.endswith("fetch"):
            answer = self.mailbox.fetch(*struct.unpack("<Q", body))
        else:
            self.mailbox.push(body)
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


class Node(threading.Thread):
    """Fetches, works, pushes, and tries again whatever goes wrong."""

    def __init__(self, box: Mailbox, node: int, port: int, tls: Certificates) -> None:
        super().__init__(daemon=True)
        self._box, self._node, self._port = box, node, port
        self._trust = ssl.create_default_context(cafile=tls.authority)
        self.faults: list[Exception] = []
        self.stop = False

    def _ask(self, what: str, body: bytes) -> bytes:
        while not self.stop:
            link = http.client.HTTPSConnection(
                "127.0.0.1", self._port, context=self._trust, timeout=PATIENCE
            )
            try:
                link.request("POST", f"/v1/fleet/{what}", body)
                answer = link.getresponse()
                found = answer.read()
                if answer.status == 200:
                    return found
            except (OSError, http.client.HTTPException) as error:
                self.faults.append(error)
            finally:
                link.close()
        return b""

    def run(self) -> None:
        """Until it is told to stop."""
        while not self.stop:
            data = self._ask("fetch", struct.pack("<Q", self._node))
            if not data:
                time.sleep(0.01)
                continue
            said = unpack(data)
            message = Message(content_of(said["content"]), self._node, said["type"])
            flower.set_message_id(message, said["id"])
            with WORK:
                reply = self._box.app(message, self._box.contexts[self._node])
            content = tree_of(materialise(reply.content))
            self._ask("push", pack({"id": said["id"], "content": content}))


WORK = threading.Lock()
"""All nodes share one model."""


@contextmanager
def door(tls: Certificates) -> Iterator[int]:
    """The door before the mailbox; its port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.certificate, tls.key)
    trust = ssl.create_default_context(cafile=tls.authority)
    with test_proxy.superlink(tls) as (inner, _):
        made, loop = Door(("127.0.0.1", inner), trust), asyncio.new_event_loop()
        serving = asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=context)
        server = loop.run_until_complete(serving)
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


@contextmanager
def network(
    weather: Callable[[int], Weather], tls: Certificates, patch: pytest.MonkeyPatch
) -> Iterator[tuple[Mailbox, list[Node], Proxy]]:
    """Nodes, the bad network, the door, and the mailbox behind it."""
    strategy = ROW.federation().strategy
    box = Mailbox(ProgramApp(toy.environment([strategy.client], model=ROW.model)))
    patch.setattr(Handler, "mailbox", box, raising=False)
    patch.setattr(test_proxy, "SuperLink", Handler)
    patch.setattr(
        remote,
        "time",
        SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: time.sleep(0.01)),
    )
    with door(tls) as port, running(port, weather) as (outside, proxy):
        nodes = [Node(box, n, outside, tls) for n in box.contexts]
        for node in nodes:
            node.start()
        try:
            yield box, nodes, proxy
        finally:
            for node in nodes:
                node.stop = True
            for node in nodes:
                node.join(10)


def bad(seed: int, kind: str) -> Callable[[int], Weather]:
    """Every third connection or so has a fault, somewhere."""

    def weather(number: int) -> Weather:
        draw = np.random.default_rng([seed, number])
        if draw.random() > 0.3:
            return CALM
        at, back = int(draw.integers(1, 4000)), bool(draw.integers(2))
        return {
            "latency": Weather(latency=0.03),
            "reset": Weather(reset=at, answers=back),
            "corrupted": Weather(flip=at, answers=back),
            "half open": Weather(silent=at, answers=back),
        }[kind]

    return weather


KINDS = ("latency", "reset", "corrupted", "half open")


def rounds(weather: Callable[[int], Weather], tls: Certificates, patch: pytest.MonkeyPatch) -> Any:
    """The hash of the model and the nodes after three rounds."""
    with network(weather, tls, patch) as (box, nodes, _):
        grid = RemoteGrid(box, CLIENTS)
        grid.wait(60)
        fed = ROW.federation(wrap=lambda _: grid)
        return toy.sha256(toy.run(fed).arrays), nodes, box


@pytest.mark.parametrize("kind", KINDS)
def test_rounds_on_a_bad_network(
    kind: str, tls: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, nodes, _ = rounds(bad(1, kind), tls, monkeypatch)
    assert found == toy.sha256(toy.run(ROW.federation()).arrays)
    assert kind == "latency" or any(node.faults for node in nodes), "nothing went wrong"


def test_planted_doubles_count(tls: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes every reply for the next one that it waits for."""
    monkeypatch.setattr(Intake, "_fault", lambda self, message, reply, done: None)
    with network(bad(1, "reset"), tls, monkeypatch) as (box, _, _):
        grid = RemoteGrid(box, CLIENTS)
        grid.wait(60)
        spoil(box)
        fed = ROW.federation(wrap=lambda _: grid)
        found = toy.sha256(toy.run(fed).arrays)
    assert found != toy.sha256(toy.run(ROW.federation()).arrays)


def spoil(box: Mailbox) -> None:
    """Every reply comes a second time, with another model in it."""
    push = box.push

    def twice(body: bytes) -> None:
        push(body)
        said = unpack(body)
        for record in said["content"].values():
            for name, tensor in record.get("arrays", {}).items():
                record["arrays"][name] = tensor * 2
        push(pack(said))

    box.push = twice  # type: ignore[method-assign]


def test_a_second_reply_with_other_content_does_not_count(
    tls: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    with network(lambda _: CALM, tls, monkeypatch) as (box, _, _):
        grid = RemoteGrid(box, CLIENTS)
        grid.wait(60)
        spoil(box)
        fed = ROW.federation(wrap=lambda _: grid)
        found = toy.sha256(toy.run(fed).arrays)
    assert found == toy.sha256(toy.run(ROW.federation()).arrays)
