"""``fedsim device``: start, stop and look after the device that this machine is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="device",
    help="Keep this machine in a federation (see docs/deploy.md).",
    no_args_is_help=True,
)

Name = Annotated[str | None, typer.Option(help="Name of the device; default: device.")]
Folder = Annotated[str | None, typer.Option(metavar="DIR", help="Its folder, instead of a name.")]


@app.command()
def start(
    superlink: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The fleet's door.")
    ] = None,
    authority: Annotated[
        Path | None, typer.Option(help="Certificate that vouches for it (ca.crt).")
    ] = None,
    partition: Annotated[int | None, typer.Option(help="Number of this device's client.")] = None,
    partitions: Annotated[
        int, typer.Option(help="Also serve the clients partition + this, and so on.")
    ] = 0,
    port: Annotated[int, typer.Option(help="Of Flower's own interface, local only.")] = 9094,
    name: Name = None,
    folder: Folder = None,
) -> None:
    """Start the device; it stays in the federation until it is stopped.

    Where it belongs is said once: later `fedsim device start` is enough.
    """
    from fedsim.core.errors import ConfigError
    from fedsim.deploy import device as devices

    place, made = devices.place(name, folder), None
    given = (superlink, authority, partition)
    if superlink is not None and authority is not None and partition is not None:
        if not authority.exists():
            raise ConfigError(f"--authority = {authority} is not there; copy it from the server")
        made = devices.Device(superlink, str(authority.resolve()), partition, partitions, port)
    elif any(v is not None for v in given):
        raise ConfigError("give --superlink, --authority and --partition together, or none of them")
    pid = devices.start(place, made)
    typer.echo(f"started (process {pid}); register {place / 'key.pub'} on the server")


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
