"""What systemd is told, and that it cannot stop us by not listening."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import service

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with (
        TemporaryDirectory(prefix="pbotvm-", dir="/tmp") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
    ):
        place = Path(folder) / "notify"
        sock.bind(str(place))
        sock.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(place))
        yield sock


def test_a_state_is_told(systemd: socket.socket) -> None:
    service.notify("READY=1")
    assert systemd.recv(100) == b"READY=1"


def test_a_listener_that_does_not_read_stops_nobody(systemd: socket.socket) -> None:
    for _ in range(10_000):  # far more than a socket keeps; without the flag this never ends
        service.notify("WATCHDOG=1")
    assert systemd.recv(100) == b"WATCHDOG=1"


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    service.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/at/all")
    service.notify("READY=1")


@pytest.mark.parametrize(("period", "pid", "beats"), [("200000", "", True), ("", "", False), ("200000", "1", False)])
async def test_the_watchdog_is_told_when_it_asks(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch, period: str, pid: str, *, beats: bool
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", period)
    monkeypatch.setenv("WATCHDOG_PID", pid or str(os.getpid()))
    systemd.setblocking(False)
    async with service.alive():
        await asyncio.sleep(0.5)
    heard = 0
    try:
        while systemd.recv(100) == b"WATCHDOG=1":
            heard += 1
    except BlockingIOError:
        pass
    assert (heard > 1) is beats
