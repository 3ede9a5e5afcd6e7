"""The private parts of Flower that a device needs, all in this file.

`tests/deploy/test_processes.py` names what broke when a new Flower moves one of them.
"""

from __future__ import annotations

from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supernode.cli import flower_supernode as flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor


def sign_off(superlink: str, authority: Path, key: Path, node_id: int) -> bool:
    """Tell the SuperLink, signed with the device's key, that the node is gone.

    Without it a SuperLink lets a node that was killed come back only after its heartbeat has run
    out, which takes a minute.

    Args:
        superlink: ``HOST:PORT``.
        authority: certificate that vouches for it.
        key: the device's private key.
        node_id: the node.

    Returns:
        whether the SuperLink took note; it does not if the node is offline already.
    """
    private = load_ssh_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    interceptors: list[ProtobufClientInterceptor] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(private, private.public_key()),
    ]
    try:
        with FleetHttpClient.from_server_address(
            superlink, False, str(authority), interceptors=interceptors
        ) as client:
            client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
    except httpx.HTTPError:
        return False
    return True
