"""The keeper's control socket: our own commands reach a running machine through it.

It speaks the native protocol, so that `exec` uses the same `Channel` whether it talks to a keeper or to a guest. The
socket lies in a private folder, and only processes of its owner (or root) are answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING

from pbotvm_qemu import paths, state
from pbotvm_qemu.channel import Channel
from pbotvm_qemu.errors import (
    OURS,
    GuestError,
    NeverRanError,
    PbotVMError,
    RunLostError,
    StateError,
    UsageError,
)
from pbotvm_qemu.guest import spec, wire
from pbotvm_qemu.guest.wire import FrameType

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from pbotvm_qemu.channel import Outcome, Stream
    from pbotvm_qemu.pool import Pool
    from pbotvm_qemu.runlog import RunLog
    from pbotvm_qemu.sessions import Sessions

    Handler = Callable[[dict[str, object]], Awaitable[dict[str, object]]]

log = logging.getLogger(__name__)

_HANDSHAKE = 5.0  # seconds for a keeper to answer


def peer_uid(sock: socket.socket) -> int:
    """Return the user id of the process at the other end of a Unix socket (SO_PEERCRED, unix(7))."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


async def connect(path: Path) -> Channel:
    """Return a channel to the keeper that listens at `path`.

    Raises StateError when none listens there or it is not ours.
    """
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, str(path))
        if peer_uid(sock) not in (os.geteuid(), 0):
            raise StateError(f"{path} belongs to another user's process", hint="remove it")
        channel = await Channel.open(sock)
    except OSError as exc:
        sock.close()
        raise StateError(f"the machine's process does not answer at {path}: {exc.strerror}") from exc
    except BaseException:
        sock.close()
        raise
    try:
        await channel.handshake(_HANDSHAKE)
    except GuestError as exc:
        await channel.close()
        raise StateError(f"the machine's process does not answer: {exc}") from exc
    return channel


async def ask(name: str, question: dict[str, object], *, timeout: float = 30.0) -> dict[str, object]:
    """Return the answer of the keeper of machine `name`.

    Raises StateError when nobody keeps it or the answer is an error.
    """
    kept = state.running(name)
    if kept is None or kept.purpose not in ("run", "start"):
        state.load(name)
        raise StateError(f"machine {name!r} is not running", hint=f"start it with `pbotvm-qemu start {name}`")
    talk = await connect(paths.MachinePaths(name).control_socket)
    try:
        answer = await talk.control(question, timeout=timeout)
    finally:
        await talk.close()
    if "error" in answer:
        hint = answer.get("hint")
        error = UsageError if answer.get("exit_code") == UsageError.exit_code else StateError
        raise error(str(answer["error"]), hint=str(hint) if hint else None)
    return answer


class ControlServer:
    """Serves the control socket of one machine. A context manager."""

    def __init__(self, path: Path, pool: Pool, sessions: Sessions, handler: Handler, runs: RunLog) -> None:
        self._path = path
        self._pool = pool
        self._sessions_of_pool = sessions
        self._handler = handler
        self._runs = runs
        self._server: asyncio.Server | None = None
        self._sessions: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> ControlServer:
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._accept, self._path)
        self._path.chmod(0o600)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._server
        self._server.close()
        for session in self._sessions:
            session.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._sessions.add(task)
        try:
            sock = writer.get_extra_info("socket")
            if peer_uid(sock) in (os.geteuid(), 0):
                await _Session(reader, writer, self._pool, self._sessions_of_pool, self._handler, self._runs).serve()
        except (OSError, wire.WireError, asyncio.CancelledError):
            pass  # the peer is gone, no peer of ours, or we stop; asyncio would print a traceback for the last
        finally:
            self._sessions.discard(task)
            writer.close()


class _Incoming:
    """One run that a client asked for: what it has sent so far, and how much more it may."""

    def __init__(self, request: spec.RunSpec, session: str | None) -> None:
        self.spec = request
        self.session = session
        self.content: list[bytearray] = [bytearray() for _ in request.files]
        self.current = 0
        self.stdin: asyncio.Queue[bytes] = asyncio.Queue()
        self.stdin_window = wire.STDIN_WINDOW
        self.room = wire.OUTPUT_WINDOW
        self.more_room = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self._skip()

    @property
    def complete(self) -> bool:
        return self.current == len(self.spec.files)

    def data(self, payload: bytes) -> None:
        """Take file content. Raises WireError for more than was announced."""
        view = memoryview(payload)
        while view:
            if self.complete:
                raise wire.WireError("more file data than the run frame announced")
            left = self.spec.files[self.current].size - len(self.content[self.current])
            self.content[self.current] += view[:left]
            view = view[left:]
            self._skip()

    def _skip(self) -> None:
        while not self.complete and len(self.content[self.current]) == self.spec.files[self.current].size:
            self.current += 1


class _Session:
    """One client of the control socket."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pool: Pool,
        sessions: Sessions,
        handler: Handler,
        runlog: RunLog,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._pool = pool
        self._sessions = sessions
        self._handler = handler
        self._runlog = runlog
        self._runs: dict[int, _Incoming] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Answer until the client closes. Its runs end with it."""
        decoder = wire.Decoder()
        try:
            while data := await self._reader.read(1 << 16):
                for frame in decoder.feed(data):
                    self._dispatch(frame)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _dispatch(self, frame: wire.Frame) -> None:
        run = self._runs.get(frame.id)
        if frame.type == FrameType.HELLO:
            self._hello(wire.decode_json(frame.payload))
        elif frame.type == FrameType.PING:
            self._writer.write(wire.encode(FrameType.PING, frame.id, frame.payload))
        elif frame.type == FrameType.CONTROL:
            self._spawn(self._control(frame))
        elif frame.type == FrameType.RUN:
            try:
                question = wire.decode_json(frame.payload)
                session = question.get("session")
                run = _Incoming(spec.parse(question), None if session is None else str(session))
                self._runs[frame.id] = run
            except spec.BadRequestError as exc:
                self._error(frame.id, "bad-request", str(exc))
            else:
                self._begin(frame.id, run)
        elif run is not None:
            self._for_run(frame, run)

    def _for_run(self, frame: wire.Frame, run: _Incoming) -> None:
        if frame.type == FrameType.DATA:
            run.data(frame.payload)
            self._begin(frame.id, run)
        elif frame.type == FrameType.STDIN:
            run.stdin_window -= len(frame.payload)
            if run.stdin_window < 0:
                raise wire.WireError("more input than the credit allows")
            run.stdin.put_nowait(frame.payload)
        elif frame.type == FrameType.CREDIT:
            run.room = min(run.room + wire.credit(frame), wire.OUTPUT_WINDOW)
            run.more_room.set()
        elif frame.type == FrameType.CANCEL and run.task:
            run.task.cancel()

    def _hello(self, question: dict[str, object]) -> None:
        answer = {"nonce": question.get("nonce"), "protocol": wire.VERSION, "agent": "keeper", "transport": "control"}
        self._writer.write(wire.encode_json(FrameType.HELLO, 0, answer))

    def _begin(self, id_: int, run: _Incoming) -> None:
        if run.complete and run.task is None:
            run.task = self._spawn(self._run(id_, run))

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _control(self, frame: wire.Frame) -> None:
        try:
            answer = await self._handler(wire.decode_json(frame.payload))
        except PbotVMError as exc:
            answer = {"error": str(exc), "hint": exc.hint, "exit_code": exc.exit_code}
        except Exception as exc:  # whoever asks must not wait for an answer that never comes
            log.exception("a question on the control socket failed")
            answer = {
                "error": f"the keeper failed: {exc!r}"[:1000],
                "hint": "see `pbotvm-qemu logs`",
                "exit_code": OURS,
            }
        self._writer.write(wire.encode_json(FrameType.CONTROL, frame.id, answer))

    async def _run(self, id_: int, run: _Incoming) -> None:
        async def output(stream: Stream, data: bytes) -> None:
            while run.room <= 0:
                run.more_room.clear()
                await run.more_room.wait()
            run.room -= wire.cost(data)
            self._writer.write(wire.encode(FrameType.STDOUT if stream == "stdout" else FrameType.STDERR, id_, data))
            await self._writer.drain()

        async def stdin() -> AsyncIterator[bytes]:
            while data := await run.stdin.get():
                run.stdin_window += len(data)
                self._writer.write(wire.encode_credit(id_, len(data)))
                yield data

        record = self._runlog.begin("exec", caller=f"uid{os.geteuid()}", machine=self._pool.name)
        record.language = run.spec.language or "-"
        record.result = "cancelled"
        try:
            where = self._pool if run.session is None else self._sessions.get(run.session)
            outcome = await where.run(run.spec, [bytes(data) for data in run.content], on_output=output, stdin=stdin())
            record.result, record.queue_s = outcome.limit or str(outcome.exit_code), outcome.queue_s
            record.clone = outcome.clone
            await self._answer(id_, run, outcome)
        except PbotVMError as exc:
            code = "run-lost" if isinstance(exc, RunLostError) or not isinstance(exc, NeverRanError) else "never-ran"
            record.result, record.detail = code, str(exc)
            self._error(id_, code, str(exc), exc.hint)
        finally:
            self._runlog.end(record)
            self._runs.pop(id_, None)

    async def _answer(self, id_: int, run: _Incoming, outcome: Outcome) -> None:
        for name, why in outcome.missing.items():
            self._writer.write(wire.encode_json(FrameType.FILE, id_, {"name": name, "error": why}))
        for name, data in outcome.files.items():
            self._writer.write(wire.encode_json(FrameType.FILE, id_, {"name": name, "size": len(data)}))
            for start in range(0, len(data), wire.CHUNK):
                while run.room <= 0:
                    run.more_room.clear()
                    await run.more_room.wait()
                piece = data[start : start + wire.CHUNK]
                run.room -= wire.cost(piece)
                self._writer.write(wire.encode(FrameType.DATA, id_, piece))
                await self._writer.drain()
        self._writer.write(wire.encode_json(FrameType.EXIT, id_, outcome.to_json()))

    def _error(self, id_: int, code: str, message: str, hint: str | None = None) -> None:
        with contextlib.suppress(wire.WireError):
            self._writer.write(
                wire.encode_json(FrameType.ERROR, id_, {"code": code, "message": message[:4000], "hint": hint})
            )
