"""The front door for PBot's `vm-client`: one line in, text out, connection closed.

This is where strangers connect, so everything is counted: connections, bytes that wait, seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from pbotvm_qemu.config import LOOPBACK
from pbotvm_qemu.errors import ConfigError, HostError
from pbotvm_qemu.reply import UNAVAILABLE, trim

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pbotvm_qemu.config import RelayConfig

LINE_MAX = 2 << 20  # bytes of one request; the predecessor refused over 128 KiB
LINE_TIMEOUT = 5.0  # seconds until the request must have come
_HELD_MAX = 32 << 20  # bytes of all requests that are read, wait or run
_UNASKED_MAX = 256  # connections whose line has not come; one more, and the oldest has to go
_SESSIONS_MAX = 1024  # connections in all
_CHUNK = 1 << 16
_LINGER = 2.0  # seconds in which a caller who still sends can read that he was refused

TOO_LONG = f"The request is longer than {LINE_MAX >> 20} MiB."


class _Session:
    """One connection."""

    def __init__(self, relay: Relay, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._relay = relay
        self._reader = reader
        self._writer = writer
        self._held = 0
        self.task = asyncio.current_task()
        self.evicted = False
        peer = writer.get_extra_info("peername")
        self.peer = str(peer[0]) if peer else "?"

    async def serve(self) -> None:
        """Read the line, answer it, close."""
        try:
            text = await self._converse()
            if text is not None:
                await self._reply(text)
        finally:
            self._relay.held -= self._held
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    async def _converse(self) -> str | None:
        relay = self._relay
        relay.unasked[self] = None
        try:
            line = await self._line()
        except _RefusedError as exc:
            return str(exc)
        except asyncio.CancelledError:
            if not self.evicted or self.task is None:
                raise
            self.task.uncancel()
            return UNAVAILABLE
        finally:
            relay.unasked.pop(self, None)
        if line is None:
            return None
        relay.requests += 1
        return await relay.answer(line, self.peer)

    async def _line(self) -> bytes | None:
        """Return the first line that is not blank, None when none comes in time, as in the predecessor.

        Raises _RefusedError for one that is too long.
        """
        line = bytearray()
        try:
            async with asyncio.timeout(LINE_TIMEOUT):
                while True:
                    piece = await self._reader.read(_CHUNK)
                    searched = len(line)
                    line += piece
                    self._hold(len(line))
                    while (end := line.find(b"\n", searched)) >= 0:
                        if line[:end].strip():
                            return self._take(line[:end])
                        del line[: end + 1]
                        searched = 0
                    if not piece:  # the caller closed his half without a line feed
                        return self._take(line) if line.strip() else None
        except TimeoutError:
            return None

    def _take(self, line: bytearray) -> bytes:
        self._hold(len(line))
        return bytes(line).strip(b"\r\n")

    def _hold(self, size: int) -> None:
        """Account for what this connection keeps in memory."""
        self._relay.held += size - self._held
        self._held = size
        if size > LINE_MAX:
            raise _RefusedError(TOO_LONG)
        if self._relay.held > _HELD_MAX:
            raise _RefusedError(UNAVAILABLE)

    async def _reply(self, text: str) -> None:
        self._relay.held -= self._held
        self._held = 0
        self._writer.write(trim(text).encode("utf-8", "replace") + b"\n")
        async with asyncio.timeout(LINE_TIMEOUT):
            await self._writer.drain()
            if self._writer.can_write_eof():
                self._writer.write_eof()
        # What is unread when a socket is closed turns the end into a reset, and the reply may be lost with it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while await self._reader.read(_CHUNK):
                    pass


class _RefusedError(Exception):
    """The line is not taken; the text is the reply."""


class Relay:
    """Serves PBot clients on one TCP address. A context manager.

    `answer(line, peer)` gives the text for one line, without an end of line.
    """

    def __init__(self, config: RelayConfig, answer: Callable[[bytes, str], Awaitable[str]]) -> None:
        self._config = config
        self.answer = answer
        self._server: asyncio.Server | None = None
        self._sessions: set[_Session] = set()
        self.unasked: dict[_Session, None] = {}  # in the order of coming
        self.held = 0  # bytes
        self.requests = 0
        self.refused = 0

    async def __aenter__(self) -> Relay:
        check_address(self._config)
        try:
            self._server = await asyncio.start_server(
                self._accept, self._config.host, self._config.port, limit=_CHUNK, reuse_address=True, backlog=1024
            )
        except OSError as exc:
            raise HostError(
                f"cannot listen on {self._config.host}:{self._config.port}: {exc.strerror}",
                hint="stop what listens there, or choose another port with --listen or PBOTVM_PORT",
            ) from exc
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.close()
        tasks = [session.task for session in self._sessions if session.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Accept no more callers; those who have asked are still answered, the others are told to come back."""
        if self._server:
            self._server.close()
        for session in list(self.unasked):
            self._evict(session)

    async def drain(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until every caller has his answer; tell whether all have."""
        until = time.monotonic() + timeout
        while self._sessions and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return not self._sessions

    @property
    def address(self) -> str:
        """HOST:PORT on which it really listens."""
        assert self._server
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    def status(self) -> dict[str, object]:
        """Return figures for `status`."""
        return {
            "address": self.address,
            "connections": len(self._sessions),
            "requests": self.requests,
            "refused": self.refused,
            "held_bytes": self.held,
        }

    def _evict(self, session: _Session) -> None:
        session.evicted = True
        self.refused += 1
        self.unasked.pop(session, None)
        if session.task:
            session.task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._sessions) >= _SESSIONS_MAX:
            self.refused += 1
            writer.write(f"{UNAVAILABLE}\n".encode())
            writer.close()
            return
        session = _Session(self, reader, writer)
        self._sessions.add(session)
        if len(self.unasked) >= _UNASKED_MAX:
            self._evict(next(iter(self.unasked)))
        try:
            await session.serve()
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # the caller is gone or does not read, or we stop; asyncio would print a traceback for the last
        finally:
            self._sessions.discard(session)


def check_address(config: RelayConfig) -> None:
    """Raise ConfigError for an address beyond loopback where anybody could run programs."""
    if config.host in (LOOPBACK, "localhost", "::1") or config.token or config.no_auth:
        return
    raise ConfigError(
        f"the relay does not listen on {config.host} for everybody: whoever reaches it can run programs",
        hint="set a token (PBOTVM_TOKEN, or token in [relay]), or allow it with --no-auth",
    )
