"""``fedsim device``: start, stop and look after the device that this machine is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedsim.deploy.device import Device

app = typer.Typer(
    name="device",
    help="Keep this machine in a federation (see docs/deploy.md).",
    no_args_is_help=True,
)

Name = Annotated[str | None, typer.Option(help="Name of the device; default: device.")]
Folder = Annotated[str | None, typer.Option(metavar="DIR", help="Its folder, instead of a name.")]
SuperLink = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="The fleet's door.")]
Authority = Annotated[Path | None, typer.Option(help="Certificate that vouches for it (ca.crt).")]
Partition = Annotated[int | None, typer.Option(min=0, help="Number of this device's client.")]
Partitions = Annotated[
    int, typer.Option(min=0, help="Also serve the clients partition + this, and so on.")
]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Of Flower's own interface, local only.")]


def _device(
    superlink: str | None, authority: Path | None, partition: int | None, rest: tuple[int, int]
) -> Device | None:
    """What the options say; None if they say nothing."""
    from fedsim.core.errors import ConfigError
    from fedsim.deploy.device import Device

    if superlink is not None and authority is not None and partition is not None:
        if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:/\s]+):\d{1,5}", superlink):
            raise ConfigError(
                f"--superlink = {superlink} is not HOST:PORT, as in fl.example.org:8443"
            )
        if not authority.exists():
            raise ConfigError(f"--authority = {authority} is not there; copy it from the server")
        return Device(superlink, str(authority.resolve()), partition, *rest)
    if any(v is not None for v in (superlink, authority, partition)):
        raise ConfigError("give --superlink, --authority and --partition together, or none of them")
    return None


@app.command()
def start(
    superlink: SuperLink = None,
    authority: Authority = None,
    partition: Partition = None,
    partitions: Partitions = 0,
    port: Port = 9094,
    name: Name = None,
    folder: Folder = None,
) -> None:
    """Start the device; it stays in the federation until it is stopped.

    Where it belongs is said once: later `fedsim device start` is enough.
    """
    from fedsim.deploy import device as devices

    place = devices.place(name, folder)
    pid = devices.start(place, _device(superlink, authority, partition, (partitions, port)))
    typer.echo(f"started (process {pid}); the server must know {place / 'key.pub'}")


@app.command()
def run(
    superlink: SuperLink = None,
    authority: Authority = None,
    partition: Partition = None,
    partitions: Partitions = 0,
    port: Port = 9094,
    name: Name = None,
    folder: Folder = None,
) -> None:
    """As start, but stay in the foreground: for systemd and containers."""
    from fedsim.deploy import device as devices

    place = devices.place(name, folder)
    devices.prepare(place, _device(superlink, authority, partition, (partitions, port)))
    devices.supervise(place)


@app.command()
def stop(name: Name = None, folder: Folder = None) -> None:
    """Stop the device and all it started."""
    from fedsim.deploy import device as devices

    stopped = devices.stop(devices.place(name, folder))
    typer.echo("stopped" if stopped else "it was not running")


@app.command()
def key(name: Name = None, folder: Folder = None) -> None:
    """Make the device's key pair if it has none, and print the public half."""
    from fedsim.deploy import device as devices
    from fedsim.deploy.keys import device_key

    typer.echo(device_key(devices.place(name, folder) / "key").read_text())


@app.command()
def status(
    name: Name = None,
    folder: Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="As a JSON object.")] = False,
) -> None:
    """Say what the device is doing."""
    from fedsim.deploy import device as devices

    found = devices.status(devices.place(name, folder))
    if as_json:
        typer.echo(json.dumps(found))
        return
    for field, value in found.items():
        typer.echo(f"{field:12} {value}")
