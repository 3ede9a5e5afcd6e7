"""How node ids and client numbers go together."""

from __future__ import annotations


def node_of(client: int) -> int:
    """Node id of a client: its partition number plus one (Flower's ids are above zero)."""
    return client + 1


def client_at(node: int) -> int:
    """Partition number of a node id."""
    return node - 1
