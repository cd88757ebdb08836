"""The ways to a guest's agent, one class each behind one interface.

Whatever the way, the bytes are the same frames, and `Channel` talks them. `reach` opens one; `choose` takes the first
that answers of several, and says why it was not an earlier one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from pbotvm_qemu.channel import Channel, Hello
from pbotvm_qemu.errors import GuestError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

log = logging.getLogger(__name__)

Name = Literal["vsock", "vhost-user-vsock", "virtio-serial", "isa-serial"]
NAMES: tuple[str, ...] = get_args(Name)  # the preferred first
AUTO = "auto"
DAEMON: Name = "vhost-user-vsock"

FALL_BACK = 1.0  # seconds that a preferred way may refuse, and mostly also be silent, before the next one is taken
_PLUGGED = 6.0  # seconds for a guest that may not have found its device yet
_DRIVEN = 2.0  # seconds for one that has; on a loaded host a hundredth of that was the most
_SLOWER = 10  # times as long as it took to find the device, when that is longer
_ATTEMPT = 0.3  # seconds for the first try on a transport that connects; twice as many for each further one
_AGAIN = 0.05  # seconds between two tries to connect: a guest that was just restored may refuse the first one
_ANSWER_MAX = 64  # bytes of the daemon's answer


class Transport(Protocol):
    """One way to the agent of one guest."""

    name: Name
    connects: bool  # whether each stream is a new connection
    patience: float  # seconds that it may be silent when there is another way
    prelude: bytes  # what brings the guest's end of the stream to where a frame can begin

    async def connect(self) -> socket.socket:
        """Return a stream to the agent, which the caller closes. Raises OSError or GuestError."""


class VirtioSerial:
    """A virtio-serial port: one stream that lives as long as its QEMU, `stream` is our end of it."""

    name: Name = "virtio-serial"
    connects = False
    patience = FALL_BACK
    prelude = b""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream

    async def connect(self) -> socket.socket:
        """Return the stream; closing it does not end it."""
        return self._stream.dup()


class IsaSerial:
    """The third serial line: the stream of a clone, or a TCP port that QEMU listens on.

    PBot's peers use the same line: two line feeds end whatever they left half said, and a frame begins our talk.
    """

    name: Name = "isa-serial"
    connects = False
    patience = FALL_BACK
    prelude = b"\n\n"

    def __init__(self, line: socket.socket | tuple[str, int]) -> None:
        self._line = line

    async def connect(self) -> socket.socket:
        """Return the line."""
        if isinstance(self._line, socket.socket):
            return self._line.dup()
        sock = await _connected(socket.AF_INET, self._line)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock


class Vsock:
    """The host kernel's vsock (/dev/vhost-vsock): context id and port of the guest."""

    name: Name = "vsock"
    connects = True
    patience = FALL_BACK
    prelude = b""

    def __init__(self, cid: int, port: int) -> None:
        self.cid = cid
        self.port = port

    async def connect(self) -> socket.socket:
        """Return a new connection."""
        return await _connected(socket.AF_VSOCK, (self.cid, self.port))


class VhostUserVsock:
    """The vsock of a `vhost-device-vsock` daemon, which listens on the UNIX socket `path`.

    A daemon that passes nothing on never will, but only time tells; a slow host is given more of it.
    """

    name: Name = DAEMON
    connects = True
    prelude = b""

    def __init__(self, path: Path, port: int, *, found: float | None = None) -> None:
        """`found` is how many seconds the guest took to find its device, None when nobody knows whether it has."""
        self.path = path
        self.port = port
        self.patience = _PLUGGED if found is None else min(max(_DRIVEN, _SLOWER * found), _PLUGGED)

    async def connect(self) -> socket.socket:
        """Return a new connection, once the daemon has said that the guest took it."""
        sock = await _connected(socket.AF_UNIX, os.fspath(self.path))
        try:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, f"CONNECT {self.port}\n".encode())
            answer = b""
            while not answer.endswith(b"\n"):  # a byte at a time: what follows the line is the guest's
                byte = await loop.sock_recv(sock, 1)
                answer += byte
                if not byte or len(answer) > _ANSWER_MAX:
                    raise GuestError(f"nothing in the guest listens on vsock port {self.port}")
            if not answer.startswith(b"OK "):
                raise GuestError(f"the vsock daemon answers {answer!r}")
        except BaseException:
            sock.close()
            raise
        return sock


async def _connected(family: int, address: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)  # type: ignore[arg-type]
    except BaseException:
        sock.close()
        raise
    return sock


@dataclass(frozen=True, slots=True)
class Reached:
    """An open way to an agent, what the agent said of itself, and why it is not a preferred way (empty when it is)."""

    channel: Channel
    hello: Hello
    why: str = ""


async def reach(transport: Transport, within: float, *, refusals: float | None = None) -> Reached:
    """Open `transport` and shake hands. Raises GuestError when the agent does not answer in `within` seconds.

    A guest that does not know its device yet swallows a request to connect, so that is given up and made again. One that
    refuses may have been restored a moment ago, and is asked again for `refusals` seconds, None for as long as all.
    """
    clock = asyncio.get_running_loop().time
    begin = clock()
    deadline = begin + within
    attempt = _ATTEMPT
    told = ""
    while True:
        channel = None
        now = clock()
        until = min(deadline, now + attempt) if transport.connects else deadline
        attempt *= 2
        try:
            async with asyncio.timeout_at(until):
                channel = await Channel.open(await transport.connect())
                hello = await channel.handshake(max(until - now, 0.01), prelude=transport.prelude)
            return Reached(channel, replace(hello, transport=transport.name))
        except (OSError, TimeoutError, GuestError) as exc:
            refused = clock() < until  # else nobody said anything
            told = str(exc) or told  # silence at the end does not unsay a refusal
            why = told or f"no answer within {within:.1f} s"
            if channel:
                await channel.close()
            last = min(deadline, begin + refusals) if refused and refusals is not None else deadline
            if clock() + _AGAIN >= last:
                raise GuestError(f"{transport.name}: {why}", hint="see `pbotvm-qemu logs`") from exc
        except BaseException:
            if channel:
                await channel.close()
            raise
        await asyncio.sleep(_AGAIN)


async def choose(transports: Sequence[Transport], within: float, *, problem: str = "") -> Reached:
    """Return the first of `transports` that answers, and why none before it; `problem` is known beforehand.

    All but the last are tried for FALL_BACK seconds when they refuse, and for their patience when they are silent.
    Raises GuestError when the last one does not answer in `within` seconds.
    """
    problems = [problem] if problem else []
    for transport in transports[:-1]:
        try:
            reached = await reach(transport, min(transport.patience, within), refusals=FALL_BACK)
            return replace(reached, why="; ".join(problems))
        except GuestError as exc:
            problems.append(str(exc))
            log.warning("%s; trying another transport", exc)
    return replace(await reach(transports[-1], within), why="; ".join(problems))
