"""The host's end of a conversation with an agent, over one byte stream.

The peer is a guest that a stranger may have taken over: every frame is bounded and checked, every wait has a deadline.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import secrets
import time
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

from pbotvm_qemu.errors import GuestError, NeverRanError, PbotVMError, RunLostError, UsedMachineError
from pbotvm_qemu.guest import wire
from pbotvm_qemu.guest.wire import FrameType

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from pbotvm_qemu.guest.spec import RunSpec

    Stream = Literal["stdout", "stderr"]
    OnOutput = Callable[[Stream, bytes], Awaitable[None]]

COLLECT_MAX = 64 << 20  # bytes of collected files that the host keeps for one run
_GRACE = 10.0  # seconds past the run's own wall limit until the agent counts as silent
_ASK_AGAIN = 0.5  # seconds until an agent that does not answer is asked who it is once more, then twice as many
_TEXT_MAX = 2000
_CONTROL_MAX = 1 << 20  # bytes of all frames of one run that carry no data: how it ended, what became of its files


@dataclass(frozen=True, slots=True)
class Hello:
    """What the agent says of itself. Words of the guest: shown, never trusted."""

    agent: str
    transport: str
    kernel: str
    hostname: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended. Either `status` (0 to 255) or `signal` is set, unless the program could not be started."""

    status: int | None
    signal: int | None
    timed_out: bool
    cancelled: bool
    truncated: bool
    limit: str | None  # "wall", "cpu", "memory", "processes", "file_size", "output"
    stage: str  # "build" or "run"
    message: str
    wall_s: float  # of the program; with the build, where that has no time of its own
    cpu_s: float | None
    memory_peak: int | None  # bytes
    files: dict[str, bytes] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # collected files that were not there, and why
    build_s: float = 0.0
    # Where and how it ran, said by the host.
    queue_s: float = 0.0
    transport: str = ""
    clone: str = ""
    revert: str = ""

    @property
    def exit_code(self) -> int:
        """What a shell would report: the status, 128 + signal, 124 after the time limit, 126 when it never started."""
        if self.timed_out:
            return 124
        if self.signal is not None:
            return 128 + self.signal
        return 126 if self.status is None else self.status

    def to_json(self) -> dict[str, object]:
        """Return the payload of an `exit` frame: everything but the files, which have frames of their own."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("files", "missing")}


class _Pending:
    """Frames for one run, and how much more the guest may send."""

    def __init__(self) -> None:
        self.frames: asyncio.Queue[wire.Frame | None] = asyncio.Queue()  # None: the channel is lost
        self.window = wire.OUTPUT_WINDOW
        self.taken = 0  # bytes of it that were handed on, and for which the guest has no credit yet
        self.control = _CONTROL_MAX
        self.stdin_credit = wire.STDIN_WINDOW
        self.stdin_room = asyncio.Event()


class Channel:
    """Made by `Channel.open`; `close` ends it. Several runs can be under way at once."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = wire.Decoder()
        self._ids = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._hello: asyncio.Future[wire.Frame] | None = None
        self._nonce = ""
        self._lost: str | None = None
        self._lost_now = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, sock: socket.socket) -> Channel:
        """Return a channel over the connected stream socket `sock`, which it owns from now on."""
        reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 18)
        return cls(reader, writer)

    async def close(self) -> None:
        """Close the stream; runs that are under way are lost, and what is not sent yet is not sent."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def handshake(self, timeout: float, *, prelude: bytes = b"") -> Hello:
        """Ask the agent who it is, throwing away whatever the stream held before its answer.

        It is asked again from time to time: the rest of an older conversation may have swallowed the question. `prelude`
        goes before each question. Raises GuestError when it does not answer in `timeout` seconds or speaks another
        version.
        """
        self._nonce = secrets.token_hex(16)
        self._decoder = wire.Decoder()
        self._decoder.expect_hello(self._nonce)
        self._hello = asyncio.get_running_loop().create_future()
        question = prelude + wire.encode_json(FrameType.HELLO, 0, {"nonce": self._nonce, "protocol": wire.VERSION})
        try:
            async with asyncio.timeout(timeout):
                pause = _ASK_AGAIN
                while True:
                    self._write(question)
                    await asyncio.wait({self._hello}, timeout=pause)
                    if self._hello.done():
                        break
                    pause *= 2
                frame = await self._hello
        except TimeoutError:
            raise GuestError(
                f"the agent did not answer within {timeout:.0f} s", hint="see `pbotvm-qemu logs`"
            ) from None
        finally:
            self._hello = None
        answer = _json(frame)
        if answer.get("protocol") != wire.VERSION:
            raise GuestError(
                f"the agent speaks protocol {str(answer.get('protocol'))[:20]}, this program {wire.VERSION}",
                hint="run `pbotvm-qemu create --force`",
            )
        words = (str(answer.get(key, ""))[:100] for key in ("agent", "transport", "kernel", "hostname"))
        return Hello(*(word if word.isprintable() else "?" for word in words))

    async def resume(self, hostname: str, *, network: dict[str, object] | None = None, timeout: float = 10.0) -> None:
        """Give the guest today's time, fresh random numbers, a name, and `network` when it has a card.

        Raises GuestError when it does not confirm.
        """
        identity = _identity(hostname) if network is None else _identity(hostname) | {"network": network}
        await self._ask(FrameType.RESUME, wire.encode_json, identity, timeout)

    def resume_soon(self, hostname: str) -> None:
        """Do the same before whatever is sent next, without waiting for the answer."""
        if not self._lost:
            self._write(wire.encode_json(FrameType.RESUME, next(self._ids), _identity(hostname)))

    async def switch_network(self, network: dict[str, object] | None) -> None:
        """Switch the guest's network card on as `network` says, or off. Raises GuestError when it does not confirm."""
        await self._ask(FrameType.RESUME, wire.encode_json, {"network": network or False}, 10.0)

    async def ping(self, *, timeout: float = 5.0) -> float:
        """Return the seconds that one empty question takes. Raises GuestError when none comes back."""
        begin = time.perf_counter()
        await self._ask(FrameType.PING, wire.encode, b"", timeout)
        return time.perf_counter() - begin

    async def control(self, question: dict[str, object], *, timeout: float) -> dict[str, object]:
        """Ask the keeper of a machine on its control socket; return its answer. Raises GuestError on silence."""
        return _json(await self._ask(FrameType.CONTROL, wire.encode_json, question, timeout))

    async def _ask(self, type_: FrameType, encode: Callable[..., bytes], value: object, timeout: float) -> wire.Frame:
        id_, pending = self._register()
        try:
            self._write(encode(type_, id_, value))
            async with asyncio.timeout(timeout):
                frame = await pending.frames.get()
        except TimeoutError:
            raise GuestError(f"no answer to {type_.name.lower()} within {timeout:.0f} s") from None
        finally:
            del self._pending[id_]
        if frame is None:
            raise GuestError(f"the channel is lost: {self._lost}")
        if frame.type == FrameType.ERROR:
            raise GuestError(f"{type_.name.lower()} was refused: {_message(frame)}")
        if frame.type != type_:
            raise GuestError(f"a frame of type {frame.type} in answer to {type_.name.lower()}")
        return frame

    async def execute(
        self,
        spec: RunSpec,
        content: Sequence[bytes],
        *,
        on_output: OnOutput,
        stdin: AsyncIterator[bytes] | None = None,
        started: Callable[[], None] | None = None,
        timeout: float | None = None,
        session: str | None = None,
    ) -> Outcome:
        """Run `spec`, whose files hold `content`, and return how it ended.

        `on_output` gets the pieces of stdout and stderr in the order of writing; while it waits, the program waits.
        `stdin` is read as fast as the program takes it. `timeout` (seconds) is for the whole conversation; the default
        is the run's wall limit and some grace. `session` names one of a keeper's, see docs/protocol.md. When the caller is cancelled, so is the program.

        Raises NeverRanError when the agent refused it, RunLostError when the channel broke after it was sent,
        GuestError when the guest broke the protocol.
        """
        limit = spec.seconds + _GRACE if timeout is None else timeout
        id_, pending = self._register()
        feeder: asyncio.Task[None] | None = None
        finished = False
        try:
            async with asyncio.timeout(limit) as deadline:
                question = spec.to_json() if session is None else spec.to_json() | {"session": session}
                self._write(wire.encode_json(FrameType.RUN, id_, question))
                for data in content:
                    await self._send(FrameType.DATA, id_, data)
                if started:
                    started()
                if spec.stdin:
                    feeder = asyncio.create_task(self._feed(id_, pending, stdin))
                outcome = await self._follow(id_, pending, on_output)
            finished = True
            return outcome
        except TimeoutError:
            if not deadline.expired():
                raise  # the caller's own deadline, or one inside on_output
            raise RunLostError(
                f"the guest did not report the end of the run within {limit:.0f} s", hint="the machine is put back"
            ) from None
        except ConnectionError as exc:
            raise RunLostError(f"the channel to the guest is lost: {exc}") from exc
        finally:
            if feeder:
                feeder.cancel()
                await asyncio.gather(feeder, return_exceptions=True)
            if not finished and not self._lost:
                with contextlib.suppress(GuestError):
                    self._write(wire.encode_json(FrameType.CANCEL, id_, {}))
            del self._pending[id_]

    async def _follow(self, id_: int, pending: _Pending, on_output: OnOutput) -> Outcome:
        """Read the frames of one run to its end."""
        files: dict[str, bytearray] = {}
        missing: dict[str, str] = {}
        current: bytearray | None = None
        collected = 0
        while True:
            frame = await pending.frames.get()
            if frame is None:
                raise RunLostError(f"the channel to the guest is lost: {self._lost}")
            if frame.type in (FrameType.STDOUT, FrameType.STDERR):
                await on_output("stdout" if frame.type == FrameType.STDOUT else "stderr", frame.payload)
                self._grant(id_, pending, wire.cost(frame.payload))
            elif frame.type == FrameType.FILE:
                answer = _json(frame)
                name = str(answer.get("name", ""))[:255]
                if "error" in answer:
                    missing[name] = str(answer["error"])[:_TEXT_MAX]
                else:
                    current = files[name] = bytearray()
            elif frame.type == FrameType.DATA and current is not None:
                collected += len(frame.payload)
                if collected > COLLECT_MAX:
                    raise GuestError(
                        f"the collected files are over {COLLECT_MAX >> 20} MiB", hint="ask for fewer or smaller files"
                    )
                current += frame.payload
                self._grant(id_, pending, wire.cost(frame.payload))
            elif frame.type == FrameType.ERROR:
                raise _refusal(frame)
            elif frame.type == FrameType.EXIT:
                return parse_outcome(_json(frame), {name: bytes(data) for name, data in files.items()}, missing)
            else:
                raise GuestError(f"the guest sent a frame of type {frame.type} in a run")

    async def _feed(self, id_: int, pending: _Pending, source: AsyncIterator[bytes] | None) -> None:
        """Send input as the guest gives credit for it, then its end."""
        async for data in source or _nothing():
            view = memoryview(data)
            while view:
                while pending.stdin_credit <= 0:
                    pending.stdin_room.clear()
                    await pending.stdin_room.wait()
                piece = view[: min(wire.CHUNK, pending.stdin_credit)]
                pending.stdin_credit -= len(piece)
                await self._send(FrameType.STDIN, id_, piece)
                view = view[len(piece) :]
        self._write(wire.encode(FrameType.STDIN, id_))

    async def _send(self, type_: FrameType, id_: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), wire.CHUNK):
            self._write(wire.encode(type_, id_, view[start : start + wire.CHUNK]))
            await self._writer.drain()

    def _grant(self, id_: int, pending: _Pending, count: int) -> None:
        pending.taken += count
        if pending.taken < wire.CREDIT:
            return
        pending.window += pending.taken
        if not self._lost:
            self._write(wire.encode_credit(id_, pending.taken))
        pending.taken = 0

    def _register(self) -> tuple[int, _Pending]:
        id_ = next(self._ids)
        pending = self._pending[id_] = _Pending()
        return id_, pending

    def _write(self, data: bytes) -> None:
        if self._lost:
            raise GuestError(f"the channel is lost: {self._lost}")
        self._writer.write(data)

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(1 << 17):
                for frame in self._decoder.feed(data):
                    self._deliver(frame)
            self._lose("the other end closed it")
        except wire.WireError as exc:
            self._lose(f"the guest broke the protocol: {exc}")
        except (OSError, GuestError) as exc:
            self._lose(str(exc) or type(exc).__name__)

    def _deliver(self, frame: wire.Frame) -> None:
        if frame.type == FrameType.HELLO:
            if self._hello and not self._hello.done():
                self._hello.set_result(frame)
            elif _json(frame).get("nonce") == "started":
                self._lose("the agent in the guest was started anew")
            return
        pending = self._pending.get(frame.id)
        if pending is None:
            return  # of a run that was given up
        if frame.type == FrameType.CREDIT:
            pending.stdin_credit = min(pending.stdin_credit + wire.credit(frame), wire.STDIN_WINDOW)
            pending.stdin_room.set()
            return
        if frame.type in (FrameType.STDOUT, FrameType.STDERR, FrameType.DATA):
            pending.window -= wire.cost(frame.payload)
            if pending.window < -wire.PAYLOAD_MAX:  # the agent may begin a frame with the last byte of its credit
                raise wire.WireError("more output than it had credit for")
        else:
            pending.control -= wire.cost(frame.payload)
            if pending.control < 0:
                raise wire.WireError("more answers than a run can have")
        pending.frames.put_nowait(frame)

    async def lost(self) -> None:
        """Return when the channel cannot be used any more."""
        await self._lost_now.wait()

    def _lose(self, why: str) -> None:
        self._lost = why
        self._lost_now.set()
        if self._hello and not self._hello.done():
            self._hello.set_exception(GuestError(f"the channel is lost: {why}"))
        for pending in self._pending.values():
            pending.frames.put_nowait(None)
        self._writer.close()


def _identity(hostname: str) -> dict[str, object]:
    return {
        "clock_ns": time.time_ns(),
        "entropy": base64.b64encode(os.urandom(64)).decode(),
        "hostname": hostname,
    }


async def _nothing() -> AsyncIterator[bytes]:
    empty: tuple[bytes, ...] = ()
    for piece in empty:
        yield piece


def _json(frame: wire.Frame) -> dict[str, object]:
    try:
        return wire.decode_json(frame.payload)
    except wire.WireError as exc:
        raise GuestError(f"the guest broke the protocol: {exc}") from exc


def _message(frame: wire.Frame) -> str:
    return _shown(_json(frame).get("message"))


def _shown(value: object) -> str:
    """Return a text of the peer's in a form that can be printed."""
    text = str(value or "")[:_TEXT_MAX]
    return "".join(character if character.isprintable() else "?" for character in text)


def _refusal(frame: wire.Frame) -> PbotVMError:
    """Return the error that an `error` frame in a run stands for: whether it may have run makes the difference."""
    answer = _json(frame)
    message, hint = _shown(answer.get("message")), _shown(answer.get("hint")) or None
    if answer.get("code") == "run-lost":
        return RunLostError(message, hint=hint)
    if answer.get("code") == "used":
        return UsedMachineError(message, hint=hint)
    return NeverRanError(message, hint=hint)


def parse_outcome(answer: dict[str, object], files: dict[str, bytes], missing: dict[str, str]) -> Outcome:
    """Return the outcome in the payload of an `exit` frame. Raises GuestError when a value makes no sense."""

    def integer(key: str, low: int, high: int) -> int | None:
        value = answer.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise GuestError(f"the guest broke the protocol: {key} is {str(value)[:40]}")
        return value

    def seconds(key: str) -> float | None:
        value = answer.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e9:
            raise GuestError(f"the guest broke the protocol: {key} is {str(value)[:40]}")
        return float(value)

    return Outcome(
        status=integer("status", 0, 255),
        signal=integer("signal", 1, 64),
        timed_out=answer.get("timed_out") is True,
        cancelled=answer.get("cancelled") is True,
        truncated=answer.get("truncated") is True,
        limit=_shown(answer.get("limit")) or None,
        stage=_shown(answer.get("stage")),
        message=_shown(answer.get("message")),
        wall_s=seconds("wall_s") or 0.0,
        build_s=seconds("build_s") or 0.0,
        cpu_s=seconds("cpu_s"),
        memory_peak=integer("memory_peak", 0, 1 << 60),
        files=files,
        missing=missing,
        queue_s=seconds("queue_s") or 0.0,
        transport=_shown(answer.get("transport")),
        clone=_shown(answer.get("clone")),
        revert=_shown(answer.get("revert")),
    )
