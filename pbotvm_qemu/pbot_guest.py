"""The back door: an unmodified `guest-server` of PBot's, in a virtual machine that somebody else keeps.

Its protocol has no request ids, and a serial line keeps its state when a caller leaves. So after a request whose end was
not seen, nothing on that line is believed until the guest has echoed a number that was never used before.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import logging
import secrets
import socket
import time
from typing import TYPE_CHECKING

from pbotvm_qemu.errors import GuestError, NeverRanError, RunLostError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from pbotvm_qemu.endpoints import Endpoint

log = logging.getLogger(__name__)

LINE_MAX = 4000  # bytes of a request line; a tty in line mode loses what is beyond 4096
_SEED_WRITE = 16383  # bytes that the seed's vm-exec wrote at once
_CONNECT = 2.0  # seconds
_HEALTH = 2.0  # seconds until the terminator must have come
_SETTLE = 75.0  # seconds for a guest to end what is under way: it gives a command 60
_BEAT_OLD = 10.0  # seconds; a guest of the seed's era beats every 5
_RETRY = 2.0  # seconds between attempts to hear a heart


class OfflineError(NeverRanError):
    """The guest's health port cannot be reached: there is no machine."""


class ResettingError(NeverRanError):
    """The heart of a guest of the seed's era does not beat."""


def _escape(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"\\x{byte:02X}" for byte in error.object[error.start : error.end]), error.end


def _escape_twice(error: UnicodeError) -> tuple[str, int]:
    text, end = _escape(error)
    return text.replace("\\", "\\\\"), end


# What is not UTF-8 becomes text that names the byte: in the answer itself, and in front of its JSON.
codecs.register_error("pbotvm-literal", _escape)
codecs.register_error("pbotvm-json", _escape_twice)


def encode(request: Mapping[str, object], *, seed: bool = False) -> bytes:
    """Return the bytes of one request: an object cut into lines that a tty takes, and an empty line.

    With `seed` it is one line and `:end:`, as before the autumn of 2025.
    """
    # 0x7F would erase a character on the guest's tty. In JSON it can be written otherwise.
    data = json.dumps(request, ensure_ascii=False).replace("\x7f", "\\u007f").encode("utf-8", "replace")
    if seed:
        return data + b"\n:end:\n"
    lines = []
    while data:
        cut = LINE_MAX
        while data.startswith(b"result:", cut):  # its echo would be taken for an answer
            cut -= 1
        lines.append(data[:cut])
        data = data[cut:]
    return b"\n".join([*lines, b"", b""])


class Results:
    """Reads one answer: `result:` lines and `result:end`, whatever else is on the line."""

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._total = 0
        self._parts: list[str] = []
        self._begun = False
        self.done = False
        self.complete = False  # the guest itself said that this is the end

    @property
    def text(self) -> str:
        """The answer so far: each result with one line feed, as the predecessor hands it on."""
        return "".join(self._parts)

    def feed(self, data: bytes) -> bytes:
        """Take bytes from the guest; return those after the end. Raises GuestError for an answer that makes no sense."""
        self._buffer += data
        begin = 0  # lines are cut off all at once: one by one, each would copy what follows it
        while not self.done:
            end = self._buffer.find(b"\n", begin)
            if (len(self._buffer) if end < 0 else end) - begin > self._limit or self._total > self._limit:
                raise GuestError(f"the guest's answer is over {self._limit} bytes")
            if end < 0:
                break
            self._line(bytes(self._buffer[begin:end]))
            begin = end + 1
        del self._buffer[:begin]
        if not self.done:
            return b""
        left = bytes(self._buffer)
        self._buffer.clear()
        return left

    def close(self) -> None:
        """Take the end of the stream for the end of the answer."""
        if self._buffer and not self.done:
            self._line(bytes(self._buffer))
            self._buffer.clear()
        self.done = True

    def _line(self, line: bytes) -> None:
        line = line.rstrip(b"\r\n")
        if line == b"result:end":
            self.done = self.complete = True
        elif line.startswith(b"result:"):
            self._begun = True
            self._append(_result(line[len(b"result:") :]))
        elif self._begun:
            self._append(line.decode("utf-8", "pbotvm-literal"))

    def _append(self, text: str) -> None:
        self._total += len(text) + 1
        self._parts.append(text + "\n")


def _result(data: bytes) -> str:
    try:
        value = json.loads(data.decode("utf-8", "pbotvm-json"), strict=False)
        text = value["result"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise GuestError("the guest's answer is not the JSON that it should be") from None
    if not isinstance(text, str):
        raise GuestError("the guest's answer holds no text")
    return text.encode("utf-8", "replace").decode()


class PBotGuest:
    """One such guest. Requests over its serial line take turns; over vsock each has a connection of its own."""

    def __init__(self, endpoint: Endpoint, *, queue: int, queue_wait: float, output: int) -> None:
        self.endpoint = endpoint
        self._queue = queue
        self._queue_wait = queue_wait
        self._limit = 8 * output + (1 << 16)  # JSON may spell one byte with six characters
        self._serial = asyncio.Lock()
        self._waiting = 0
        self._unsettled = True  # nobody knows what the last caller left on the serial line
        self._heart = _Heart(endpoint) if endpoint.seed and endpoint.health else None

    async def close(self) -> None:
        """Stop listening to its heart."""
        if self._heart:
            await self._heart.close()

    async def check(self) -> None:
        """Return when the guest says that it lives.

        Raises OfflineError when nobody listens, ResettingError for a heart that stopped, NeverRanError when the answer
        does not come in time.
        """
        if not self.endpoint.health:
            return
        if self._heart:
            await self._heart.check()
            return
        place = f"{self.endpoint.addr}:{self.endpoint.health}"
        async with _connection(*(await _open(self.endpoint.addr, self.endpoint.health))) as (reader, writer):
            try:
                async with asyncio.timeout(_HEALTH):
                    writer.write(b"\n")
                    seen = False
                    while await reader.readuntil(b"\n") not in (b":END\n", b":END\r\n"):
                        seen = True
            except asyncio.IncompleteReadError as exc:  # the predecessor takes the end of the stream for an answer
                if not exc.partial and not seen:
                    raise NeverRanError(f"the health port {place} closed without an answer") from exc
            except (TimeoutError, OSError, asyncio.LimitOverrunError) as exc:
                raise NeverRanError(f"the health port {place} did not answer in {_HEALTH:.0f} s") from exc

    async def run(self, request: Mapping[str, object], *, timeout: float) -> tuple[str, float]:
        """Return the answer to `request`, and the seconds that it had to wait for its turn.

        Raises NeverRanError before it was sent, TimeoutError when no answer came in `timeout` seconds, RunLostError
        when the guest went away, GuestError for an answer that makes no sense.
        """
        data = encode(request, seed=self.endpoint.seed)
        if self.endpoint.cid and (sock := await self._vsock()):
            async with _connection(*(await asyncio.open_connection(sock=sock, limit=1 << 16))) as (reader, writer):
                return (await self._ask(reader, writer, data, timeout)).text, 0.0
        if not self.endpoint.serial:
            raise OfflineError(f"machine {self.endpoint.name!r} cannot be reached over vsock, and has no serial port")
        async with self._turn() as waited:
            return await self._over_serial(data, timeout), waited

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[float]:
        """Have the serial line alone. Raises NeverRanError when too many wait, or it takes too long."""
        if self._waiting >= self._queue:
            raise NeverRanError(f"{self._queue} requests wait already", hint="try again later")
        begin = time.monotonic()
        self._waiting += 1
        try:
            async with asyncio.timeout(self._queue_wait):
                await self._serial.acquire()
        except TimeoutError:
            raise NeverRanError(f"the serial line was not free within {self._queue_wait:.0f} s") from None
        finally:
            self._waiting -= 1
        try:
            yield time.monotonic() - begin
        finally:
            self._serial.release()

    async def _over_serial(self, data: bytes, timeout: float) -> str:
        async with _connection(*(await _open(self.endpoint.addr, self.endpoint.serial))) as (reader, writer):
            if self._unsettled:
                await self._settle(reader, writer)
            self._unsettled = True
            results = await self._ask(reader, writer, data, timeout)
            self._unsettled = not results.complete
            return results.text

    async def _settle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Have the guest echo a fresh number, and throw away everything before that answer."""
        number = secrets.token_hex(16)
        probe = {
            "lang": "sh", "sourcefile": "prog.sh", "execfile": "prog.sh", "cmdline": "sh prog.sh", "input": None,
            "date": int(time.time()), "arguments": "", "code": f"echo {number}",
        }  # fmt: skip
        try:
            async with asyncio.timeout(_SETTLE):
                # Half a request may stand on the line: end it first. The answer to that is thrown away, too; only
                # the seed's guest-server would die of it.
                writer.write((b"" if self.endpoint.seed else b"\n\n") + encode(probe, seed=self.endpoint.seed))
                left = b""
                while True:
                    left, text = await self._answer(reader, left)
                    if text.strip() == number:
                        return
        except (TimeoutError, OSError, EOFError) as exc:
            raise NeverRanError(
                f"machine {self.endpoint.name!r} does not answer on its serial line: {exc or type(exc).__name__}"
            ) from exc

    async def _answer(self, reader: asyncio.StreamReader, left: bytes) -> tuple[bytes, str]:
        """Read one answer, of anybody's; return what follows it, and its text, empty when it makes no sense."""
        results = Results(limit=self._limit)
        try:
            left = results.feed(left)
            while not results.done:
                data = await reader.read(1 << 16)
                if not data:
                    raise EOFError("the line was closed")
                left = results.feed(data)
        except GuestError:
            return b"", ""
        return left, results.text

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes, timeout: float
    ) -> Results:
        results = Results(limit=self._limit)
        try:
            async with asyncio.timeout(timeout):
                step = _SEED_WRITE if self.endpoint.seed else 1 << 16
                for start in range(0, len(data), step):
                    writer.write(data[start : start + step])
                    await writer.drain()
                while not results.done:
                    if piece := await reader.read(1 << 16):
                        results.feed(piece)
                    else:
                        results.close()
        except OSError as exc:
            if isinstance(exc, TimeoutError):
                raise
            raise RunLostError(f"the connection to machine {self.endpoint.name!r} is lost: {exc}") from exc
        if not results.complete and not results.text:
            raise RunLostError(f"machine {self.endpoint.name!r} closed the connection without an answer")
        return results

    async def _vsock(self) -> socket.socket | None:
        """Return a vsock connection to the guest, or None when there is none to be had: the serial line is next."""
        if not hasattr(socket, "AF_VSOCK"):
            return None
        try:
            sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        except OSError as exc:
            log.warning("no vsock on this host (%s); using the serial line", exc.strerror)
            return None
        try:
            sock.setblocking(False)
            async with asyncio.timeout(_CONNECT):
                await asyncio.get_running_loop().sock_connect(sock, (self.endpoint.cid, self.endpoint.vport))
        except (OSError, TimeoutError) as exc:
            sock.close()
            where = f"{self.endpoint.cid}:{self.endpoint.vport}"
            log.warning("vsock %s cannot be reached (%s); using the serial line", where, exc or type(exc).__name__)
            return None
        except BaseException:
            sock.close()
            raise
        return sock


class _Heart:
    """Listens to the heart of a guest of the seed's era, all the time."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._last: float | None = None
        self._beat = asyncio.Event()
        self._problem = ""
        self._task = asyncio.create_task(self._listen())

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def check(self) -> None:
        """Return when it beat a moment ago; a heart that was never heard gets that moment too."""
        if self._last is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_BEAT_OLD):
                    await self._beat.wait()
        if self._last is None or time.monotonic() - self._last > _BEAT_OLD:
            raise ResettingError(f"no heartbeat of machine {self._endpoint.name!r}{self._problem}")

    async def _listen(self) -> None:
        while True:
            try:
                reader, writer = await _open(self._endpoint.addr, self._endpoint.health)
                async with _connection(reader, writer):
                    while data := await reader.read(4096):
                        if b"\n" in data:
                            self._last = time.monotonic()
                            self._beat.set()
                self._problem = ": the connection was closed"
            except (NeverRanError, OSError) as exc:
                self._problem = f": {exc}"
            await asyncio.sleep(_RETRY)


async def _open(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect, and send small pieces at once. Raises OfflineError when nobody listens."""
    try:
        async with asyncio.timeout(_CONNECT):
            reader, writer = await asyncio.open_connection(host, port, limit=1 << 16)
    except (OSError, TimeoutError) as exc:
        raise OfflineError(f"{host}:{port} cannot be reached: {exc or type(exc).__name__}") from exc
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return reader, writer


@contextlib.asynccontextmanager
async def _connection(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Close the connection at the end, whatever happened."""
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
