"""The command line of ``scripts/deploy``: options, signals, exit codes.

Nothing is imported at the top that takes time, so that Ctrl-C finds its handler from the start.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

INTERRUPTED, TERMINATED = 130, 143
ABOUT = """\
Runs one experiment on a federation of real processes: a SuperLink, the door through which devices
come in, and devices, each a supervised SuperNode with a key of its own. When it ends, however it
ends, so does all that it started; the same command goes on where it stopped.
With --nodes 0 --listen 0.0.0.0:8443 --host NAME --keys FOLDER the devices are elsewhere."""
EXITS = """\
Exit codes: 0 done, 2 the experiment or the command line is wrong, 3 the data are not there,
4 the run failed, 130 interrupted, 143 terminated. See docs/deploy.md."""


def address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` as a pair."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, as in 0.0.0.0:8443")
    return host.strip("[]"), int(port)


def _number(text: str) -> int:
    if not text.isdigit() or int(text) > 256:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 256")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="scripts/deploy",
        description=ABOUT,
        epilog=EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("experiment", nargs="?", help="TOML file; default: experiments/toy.toml")
    add("--nodes", type=_number, default=3, help="devices on this machine; default: 3")
    add("--strategy", metavar="LABEL", help="default: the first of the file")
    add("--seed", type=int, help="default: the experiment's first")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    add("--folder", default="runs/deployment",
        help="certificates, keys, devices, logs; default: runs/deployment")  # fmt: skip
    add("--out", metavar="RUN", help="run folder; default: FOLDER/run")
    add("--fresh", action="store_true", help="begin the run anew instead of going on")
    add("--listen", type=address, default=("127.0.0.1", 0), metavar="HOST:PORT",
        help="where devices come in; default: this machine only, any free port")  # fmt: skip
    add("--host", action="append", default=[], metavar="NAME",
        help="name or address by which devices call this machine; may be repeated")  # fmt: skip
    add("--keys", metavar="FOLDER", help="public keys (*.pub) of the devices elsewhere")
    add("--wait", type=float, default=120.0, metavar="SECONDS",
        help="how long every client may take to appear; default: 120")  # fmt: skip
    add("--prepare", action="store_true", help="only make the certificates that devices need")
    return made


ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED = (
    "\nscripts/deploy: interrupted; everything it started was stopped, the same command goes on"
)


class Terminated(KeyboardInterrupt):
    """SIGTERM, or the terminal is gone: as Ctrl-C, with an exit code of its own."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated


def _leave(number: int, frame: object) -> NoReturn:
    """End at once: nothing has been started yet."""
    os.write(2, f"{STOPPED}\n".encode())
    os._exit(INTERRUPTED if number == signal.SIGINT else TERMINATED)


def main(arguments: Sequence[str] | None = None) -> None:
    """``scripts/deploy``: see the options."""
    try:
        signal.signal(signal.SIGTERM, _terminate)
        signal.signal(signal.SIGHUP, _terminate)
        sys.exit(_run(parser().parse_args(arguments)))
    except KeyboardInterrupt as stop:
        for number in ENDINGS:
            signal.signal(number, signal.SIG_IGN)  # it is ending already
        print(STOPPED, file=sys.stderr)
        sys.exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED)


def _run(given: argparse.Namespace) -> int:
    from fedsim.core.errors import FedsimError

    try:
        # An exception out of a handler can be swallowed by a library that is being imported.
        before = {n: signal.signal(n, _leave) for n in ENDINGS}
        from fedsim.deploy import session

        for number, handler in before.items():
            signal.signal(number, handler)
        session.deploy(given)
    except FedsimError as error:
        print(f"scripts/deploy: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    main()
