"""A device's SuperNode, which first tells the server that the one before it is gone.

One program for both: they need the same libraries, whose import is most of the time that a device
takes to come back.

``python -m fedsim.deploy.node FOLDER [NODE-ID]``: the device, and the node that is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedsim.deploy import fleet
from fedsim.deploy.device import Device


def main(arguments: Sequence[str]) -> None:
    """See above; returns when the SuperNode ends."""
    folder, gone = Path(arguments[0]), [int(a) for a in arguments[1:2]]
    device = Device.load(folder)
    for node_id in gone:
        with suppress(OSError, ValueError):
            fleet.sign_off(device.superlink, Path(device.authority), folder / "key", node_id)
    sys.argv = ["flower-supernode", *device.arguments(folder)]
    fleet.flower_supernode()


if __name__ == "__main__":
    main(sys.argv[1:])
