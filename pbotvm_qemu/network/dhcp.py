"""DHCP for guests that have no agent of ours: dnsmasq on our bridge, with one fixed address for each MAC of the plan.

It answers nobody else, keeps no state, and does no DNS. It is known by the name of its configuration file, which says
by a digest what is in it, so nothing has to be remembered about it.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
import tempfile
import time
from typing import TYPE_CHECKING

from pbotvm_qemu import paths, process
from pbotvm_qemu.errors import NetworkError, tail

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pbotvm_qemu.network.addresses import Plan

_DEADLINE = 10.0  # seconds for its start, and for its end


def configuration(plan: Plan, bridge: str, dns: Sequence[str], mtu: int) -> str:
    """Return dnsmasq's configuration for the guests of `plan` behind `bridge`."""
    subnet = next(net for net in plan.networks if net.version == 4)
    gateway = next(address for address in plan.gateways if address.version == 4)
    servers = ",".join(text for text in dns if ":" not in text)
    lines = [
        "port=0", "no-hosts", "no-resolv", "no-ping", "leasefile-ro", "dhcp-authoritative", "bind-interfaces", "except-interface=lo",
        f"interface={bridge}",
        f"dhcp-range={subnet.network_address},static,{subnet.netmask},1h",
        "dhcp-ignore=tag:!known",
        f"dhcp-option=option:router,{gateway}",
        f"dhcp-option=option:dns-server{',' + servers if servers else ''}",
        f"dhcp-option=option:mtu,{mtu}",
    ]  # fmt: skip
    guests = (plan.guest(number) for number in range(plan.room))
    lines += [f"dhcp-host={guest.mac},{guest.addresses[0].partition('/')[0]}" for guest in guests]
    return "\n".join(lines) + "\n"


def digest(text: str) -> str:
    """Return what a server with the configuration `text` is known by."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _folder() -> Path:
    return paths.runtime_dir() / "dhcp"


def _pid_file() -> Path:
    return _folder() / "dnsmasq.pid"


def _found() -> tuple[process.Identity, str] | None:
    """Return our server that runs, and the digest of its configuration."""
    try:
        pid = int(_pid_file().read_text("ascii"))
    except (OSError, ValueError):
        return None
    begin = f"--conf-file={_folder()}/"
    known = [word.removeprefix(begin) for word in process.command_line(pid) if word.startswith(begin)]
    identity = process.Identity.of(pid)
    return (identity, known[0].removesuffix(".conf")) if known and identity else None


def running() -> str | None:
    """Return the digest of the configuration that our server runs with, or None when none runs."""
    found = _found()
    return found[1] if found else None


def left() -> bool:
    """Tell whether there is anything of a server: itself or its files."""
    return _folder().is_dir()


async def start(text: str) -> None:
    """Start a server with the configuration `text` in place of one that may run.

    Raises NetworkError that shows what dnsmasq says when it does not start.
    """
    program = process.find_program("dnsmasq", package="dnsmasq-base")
    await stop()
    folder = paths.private(_folder(), mode=0o755)  # dnsmasq reads it after it has given up its rights
    file = folder / f"{digest(text)}.conf"
    file.write_text(text, "ascii")
    with tempfile.TemporaryFile() as log:
        argv = [program, f"--conf-file={file}", f"--pid-file={_pid_file()}", "--keep-in-foreground", "--log-facility=-"]
        child = process.Detached(argv, log=log.fileno())
        until = time.monotonic() + _DEADLINE
        while child.status is None and running() is None and time.monotonic() < until:
            await child.wait(0.05)
        if child.status is not None or running() is None:
            log.seek(0)
            await child.end(signal.SIGKILL)
            raise NetworkError(
                f"dnsmasq does not start: {tail(log.read(1 << 16)) or 'it says nothing'}",
                hint="does another DHCP server listen on the bridge? see `ss -lunp sport = 67`",
            )


async def stop() -> None:
    """End our server, and remove its files."""
    if found := _found():
        found[0].kill()
        until = time.monotonic() + _DEADLINE
        while found[0].alive() and time.monotonic() < until:
            await asyncio.sleep(0.02)
    if _folder().is_dir():
        for file in _folder().iterdir():
            file.unlink(missing_ok=True)
        _folder().rmdir()
