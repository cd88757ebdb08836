"""What systemd wants to hear from a service that it started (sd_notify(3)). Elsewhere all of this does nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def notify(text: str) -> None:
    """Tell systemd how we are, such as `READY=1`."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # Not blocking: one who does not read what he is told must not stop us.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.sendto(text.encode(), "\0" + address[1:] if address.startswith("@") else address)


@contextlib.asynccontextmanager
async def alive() -> AsyncIterator[None]:
    """Say twice in each period of `WatchdogSec=` that our event loop turns, while the body runs."""
    task = asyncio.create_task(_beat())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _beat() -> None:
    period = os.environ.get("WATCHDOG_USEC", "")
    if not period.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(int(period) / 2e6)
