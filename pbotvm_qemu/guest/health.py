"""The sign of life on the health port, for a host of either era.

The seed's host only listens, and wants a line feed every five seconds. Today's host asks with a line feed, and wants
lines of text and `:END`. Neither minds what is meant for the other.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

from .loop import READ

if TYPE_CHECKING:
    from .loop import Loop, Timer

_BEAT = 4.0  # seconds; the predecessor calls a machine dead after 5
_QUIET = 30.0  # seconds without a question after which the heart beats again
_CONNECTIONS_MAX = 16
_END = b"\r\n:END\r\n"


class Health:
    """Beats on one stream until it is asked something, and answers each line."""

    def __init__(self, loop: Loop, fd: int, *, connection: bool = False) -> None:
        self._loop = loop
        self._fd = fd
        self._connection = connection
        os.set_blocking(fd, False)
        loop.watch(fd, READ, self._ready)
        self._timer: Timer | None = None
        self._beat()

    def _beat(self) -> None:
        self._write(b"\r\n")
        self._timer = self._loop.after(_BEAT, self._beat)

    def _ready(self, _events: int) -> None:
        try:
            data = os.read(self._fd, 4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if self._timer:
            self._timer.cancel()
        if data:
            self._timer = self._loop.after(_QUIET, self._beat)
            if b"\n" in data or b"\r" in data:
                self._write(vmstat().replace(b"\n", b"\r\n") + _END)
            return
        self._loop.watch(self._fd, 0, self._ready)
        if self._connection:
            os.close(self._fd)
        else:  # nobody at the other end of the line: look again
            self._timer = self._loop.after(_BEAT, self._again)

    def _again(self) -> None:
        self._loop.watch(self._fd, READ, self._ready)
        self._beat()

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody listens, or not as fast as we speak: the next time will do
            os.write(self._fd, data)


class Listener:
    """Answers on a vsock port, each connection like a line of its own. Raises OSError when this guest cannot."""

    def __init__(self, loop: Loop, port: int) -> None:
        self._loop = loop
        self._socket = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        self._socket.bind((socket.VMADDR_CID_ANY, port))
        self._socket.listen(_CONNECTIONS_MAX)
        self._socket.setblocking(False)
        loop.watch(self._socket.fileno(), READ, lambda _events: self._accept())

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, peer = self._socket.accept()
            if peer[0] == socket.VMADDR_CID_HOST:
                Health(self._loop, sock.detach(), connection=True)
            else:
                sock.close()  # programs in this guest have no business here


def vmstat() -> bytes:
    """Return headings and one line of numbers in the layout of procps: averages since the guest's start."""
    memory = _table("/proc/meminfo")
    events = _table("/proc/vmstat")
    stat = _table("/proc/stat")
    with open("/proc/uptime", "rb") as file:
        uptime = max(1.0, float(file.read().split()[0]))
    cpu = [*stat.get("cpu", []), *[0] * 8][:8]
    total = max(1, sum(cpu))
    swap = _first(memory, "SwapTotal:") - _first(memory, "SwapFree:")
    cache = _first(memory, "Cached:") + _first(memory, "SReclaimable:")

    def rate(count: int) -> int:
        return int(count / uptime)

    def share(*ticks: int) -> int:
        return 100 * sum(ticks) // total

    numbers = (
        _first(stat, "procs_running"), _first(stat, "procs_blocked"), swap, _first(memory, "MemFree:"),
        _first(memory, "Buffers:"), cache, rate(_first(events, "pswpin")), rate(_first(events, "pswpout")),
        rate(_first(events, "pgpgin")), rate(_first(events, "pgpgout")), rate(_first(stat, "intr")),
        rate(_first(stat, "ctxt")), share(cpu[0], cpu[1]), share(cpu[2], cpu[5], cpu[6]), share(cpu[3]), share(cpu[4]),
        share(cpu[7]),
    )  # fmt: skip
    return (
        "procs -----------memory---------- ---swap-- -----io---- -system-- ------cpu-----\n"
        " r  b   swpd   free   buff  cache   si   so    bi    bo   in   cs us sy id wa st\n"
        "{:2} {:2} {:6} {:6} {:6} {:6} {:4} {:4} {:5} {:5} {:4} {:4} {:2} {:2} {:2} {:2} {:2}\n".format(*numbers)
    ).encode()


def _table(path: str) -> dict[str, list[int]]:
    """Return the whole numbers behind the first word of each line of `path`; nothing when it cannot be read."""
    table: dict[str, list[int]] = {}
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for line in file:
            name, *values = line.split()
            table[name.decode("utf-8", "replace")] = [int(value) for value in values if value.isdigit()]
    return table


def _first(table: dict[str, list[int]], name: str) -> int:
    return next(iter(table.get(name, [])), 0)
