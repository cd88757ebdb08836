"""The front door for PBot's `vm-client`: one line in, text out, connection closed.

The replies are the predecessor's, word for word, because bots show them as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from typing import TYPE_CHECKING

from pbotvm_qemu import request as requests
from pbotvm_qemu.config import LOOPBACK
from pbotvm_qemu.errors import ConfigError, HostError, NeverRanError, PbotVMError, UnknownLanguageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pbotvm_qemu.channel import Outcome, Stream
    from pbotvm_qemu.config import Limits, RelayConfig
    from pbotvm_qemu.languages import Registry
    from pbotvm_qemu.pool import Pool

log = logging.getLogger(__name__)

LINE_MAX = 2 << 20  # bytes of one request; the predecessor refused over 128 KiB
LINE_TIMEOUT = 5.0  # seconds until the request must have come
_CONNECTIONS_MAX = 256

USAGE = (
    "Usage: cc [-lang=<language>] [-vm=<virtual machine>] [-info] [-paste] "
    '[-args "command-line arguments"] [compiler/language options] <code> [-stdin <stdin input>]'
)
UNAVAILABLE = "Virtual machine is temporarily unavailable, try again soon."
MISBEHAVING = "Virtual machine is misbehaving, try again soon."


class Relay:
    """Serves PBot clients on one TCP address. A context manager."""

    def __init__(
        self, config: RelayConfig, limits: Limits, registry: Registry, installed: Sequence[str], name: str, pool: Pool
    ) -> None:
        self._config = config
        self._limits = limits
        self._registry = registry
        self._installed = installed
        self._name = name
        self._pool = pool
        self._server: asyncio.Server | None = None
        self._sessions: set[asyncio.Task[None]] = set()
        self._ids = itertools.count(1)

    async def __aenter__(self) -> Relay:
        check_address(self._config.host)
        try:
            self._server = await asyncio.start_server(
                self._accept, self._config.host, self._config.port, limit=LINE_MAX, reuse_address=True
            )
        except OSError as exc:
            raise HostError(
                f"cannot listen on {self._config.host}:{self._config.port}: {exc.strerror}",
                hint="stop what listens there, or choose another port with --listen or PBOTVM_PORT",
            ) from exc
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.close()
        for session in self._sessions:
            session.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)

    def close(self) -> None:
        """Accept no more callers; those connected are still answered."""
        if self._server:
            self._server.close()

    @property
    def address(self) -> str:
        """HOST:PORT on which it really listens."""
        assert self._server
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        if len(self._sessions) >= _CONNECTIONS_MAX:
            writer.close()
            return
        self._sessions.add(task)
        try:
            line = await self._line(reader)
            if line is not None:
                reply = await self._answer(line)
                writer.write(reply.rstrip().encode("utf-8", "replace") + b"\n")
                async with asyncio.timeout(LINE_TIMEOUT):
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # the caller is gone or does not read, or we stop; asyncio would print a traceback for the last
        finally:
            self._sessions.discard(task)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _line(self, reader: asyncio.StreamReader) -> str | None:
        """Return the first line that is not blank; None when none comes in time, as in the predecessor."""
        try:
            async with asyncio.timeout(LINE_TIMEOUT):
                while True:
                    data = await reader.readuntil(b"\n")
                    if data.strip():
                        break
        except asyncio.IncompleteReadError as exc:  # the caller closed his half without a line feed
            data = exc.partial
        except asyncio.LimitOverrunError:
            return ""  # longer than LINE_MAX: answered with the usage
        except TimeoutError:
            return None
        return data.decode("utf-8", "replace").strip("\r\n") if data.strip() else None

    async def _answer(self, line: str) -> str:
        id_ = next(self._ids)
        begin = time.monotonic()
        output = bytearray()
        cut = False
        result = "refused"
        language = "-"

        async def collect(_stream: Stream, data: bytes) -> None:
            nonlocal cut
            kept = data[: self._config.output - len(output)]
            cut = cut or len(kept) < len(data)
            output.extend(kept)

        try:
            request = requests.parse_line(line)
            if request.machine and request.machine != self._name:
                return f"Unknown machine '{request.machine[:64]}'; available machines are: {self._name}"
            found = self._registry.find(request.language, self._installed)
            language = found.name
            stdin = request.stdin
            spec, content = requests.render(request, found, self._limits, stdin=stdin is not None, chat=True)
            feed = (
                requests.once((stdin or "").encode("utf-8", "surrogateescape") + b"\n") if stdin is not None else None
            )
            outcome = await self._pool.run(spec, content, on_output=collect, stdin=feed)
            result = outcome.limit or str(outcome.exit_code)
            text = reply_text(outcome, bytes(output))
            return f"{text.rstrip()} [Output truncated]" if cut or outcome.truncated else text
        except UnknownLanguageError as exc:
            return f"{exc}\n{exc.hint}"
        except UsageError as exc:
            result = "usage"
            return USAGE if "no code" in str(exc) else f"{exc}"
        except NeverRanError as exc:
            result = f"never ran: {exc}"
            return UNAVAILABLE
        except PbotVMError as exc:
            result = f"lost: {exc}"
            return MISBEHAVING
        finally:
            log.info(
                "run %d from relay: language %s, %.3f s, result %s", id_, language, time.monotonic() - begin, result
            )


def reply_text(outcome: Outcome, output: bytes) -> str:
    """Return what a chat sees: the output and a note of how it ended, as the predecessor words it."""
    text = output.decode("utf-8", "replace")
    if outcome.timed_out:
        first = text.strip("\n").split("\n", 1)[0]
        return f"[Timed-out] {first}".rstrip()
    if outcome.message:
        return f"[Fatal error] {outcome.message}"
    if outcome.stage == "build":  # a compiler's own words are enough
        return text
    code = outcome.exit_code
    if not text.strip():
        return "Success (no output)." if code == 0 else f"Exit {code}."
    return text if code == 0 else f"{text.rstrip()} [Exit {code}]"


def check_address(host: str) -> None:
    """Raise ConfigError for an address beyond loopback: whoever reaches the relay can run programs."""
    if host not in (LOOPBACK, "localhost", "::1"):
        raise ConfigError(
            f"the relay does not listen on {host}: callers are not authenticated yet",
            hint=f"use {LOOPBACK}, and a tunnel of your own for other hosts",
        )
