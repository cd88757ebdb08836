"""The guest's serial and health ports for a machine that is kept as clones.

One TCP port cannot be many clones' serial line. So the keeper listens in QEMU's place: whoever connects to the serial
port gets the line of a clean clone for as long as he stays, and the health port tells of the whole pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Self

from pbotvm_qemu.config import LOOPBACK
from pbotvm_qemu.errors import HostError, NeverRanError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from pbotvm_qemu.pool import Pool

    Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

log = logging.getLogger(__name__)

_CONNECTIONS_MAX = 32
_CHUNK = 1 << 16
_BEAT = 4.0  # seconds; the predecessor calls a machine dead after 5
_SILENCE = 3600.0  # seconds without a byte either way after which a connection is ended


class Ports:
    """Serves the two ports; 0 stands for none. A context manager."""

    def __init__(self, pool: Pool, *, serial: int, health: int) -> None:
        self._pool = pool
        self._wanted: tuple[tuple[int, str, Serve], ...] = (
            (serial, "PBOTVM_SERIAL", self._line),
            (health, "PBOTVM_HEALTH", self._health),
        )
        self._servers: list[asyncio.Server] = []
        self._sessions: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        try:
            for port, variable, serve in self._wanted:
                if port:
                    self._servers.append(await self._listen(port, variable, serve))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_exc: object) -> None:
        for server in self._servers:
            server.close()
        for session in self._sessions:
            session.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)

    async def _listen(self, port: int, variable: str, serve: Serve) -> asyncio.Server:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task
            if len(self._sessions) >= _CONNECTIONS_MAX:
                writer.close()
                return
            self._sessions.add(task)
            try:
                await serve(reader, writer)
            except (OSError, TimeoutError, NeverRanError, asyncio.CancelledError) as exc:
                log.info("a connection to port %d ended: %s", port, exc or type(exc).__name__)
            finally:
                self._sessions.discard(task)
                writer.close()

        try:
            return await asyncio.start_server(accept, LOOPBACK, port, reuse_address=True)
        except OSError as exc:
            raise HostError(
                f"port {port} of {LOOPBACK} cannot be used: {exc.strerror}",
                hint=f"free it, or choose another with {variable}; 0 is for none",
            ) from exc

    async def _line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Join the caller and the third serial line of a clone until one of them hangs up."""
        async with self._pool.lease(caller="serial") as lease:
            assert lease.machine.serial
            guest_reader, guest_writer = await asyncio.open_connection(sock=lease.machine.serial.dup())
            ways = [
                asyncio.create_task(_copy(reader, guest_writer)),
                asyncio.create_task(_copy(guest_reader, writer)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
                guest_writer.close()

    async def _health(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Tell a host of either era that programs can be run: line feeds until it asks, then answers to its lines.

        While they cannot, say nothing: both eras take that for what it is.
        """
        asked = False
        while True:
            if not self._pool.problem and not asked:
                writer.write(b"\r\n")
                await writer.drain()
            try:
                async with asyncio.timeout(_SILENCE if asked else _BEAT):
                    data = await reader.read(_CHUNK)
            except TimeoutError:
                if asked:
                    return
                continue
            if not data:
                return
            asked = True
            if b"\n" in data and not self._pool.problem:
                writer.write(health_text(self._pool.status()))
                await writer.drain()


def health_text(status: Mapping[str, object]) -> bytes:
    """Return the answer to one question: figures that people read, an empty line, and the end that PBot's host waits for."""
    names = ("ready", "busy", "waiting", "runs")
    figures = (" ".join(names), " ".join(str(status.get(name)) for name in names))
    return "".join(f"{line}\r\n" for line in (*figures, "", ":END")).encode()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(_SILENCE) as deadline:
            while data := await source.read(_CHUNK):
                target.write(data)
                await target.drain()
                deadline.reschedule(asyncio.get_running_loop().time() + _SILENCE)
