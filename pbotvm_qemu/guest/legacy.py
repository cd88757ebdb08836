"""PBot's own protocol, for a `vm-exec` that knows nothing of us: on a serial line, and on vsock.

A request is a JSON object, cut into lines anyhow, and an empty line; or, as in the seed's era, a line `:end:`. The answer
is a line `result:{"result": TEXT}` and a line `result:end`.

C and C++ come with headers and `main`, which PBot's host has written around them. They are built and run as our own
callers' are: what they hold when they print nothing, and where they crash, is told.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
from collections import deque
from typing import TYPE_CHECKING, Protocol

from . import spec, wire, words
from .loop import READ, WRITE
from .run import Run
from .wire import FrameType

if TYPE_CHECKING:
    from collections.abc import Callable

    from .child import Owner
    from .loop import Loop

REQUEST_MAX = 8 << 20  # bytes of one request
_WAITING_MAX = 16  # requests on one line that wait for the one before
_CONNECTIONS_MAX = 16  # over vsock
_FIRST_ID = 1 << 31  # runs of the host count from 1
_WALL = 60.0  # seconds that the predecessor gives a command; its host gives 10
_GDB_WALL = 8.0  # seconds that it gives a program of C
_CPU = 8  # seconds
_FILE = 2000  # KiB
_PROCESSES = 200
_OUTPUT = 1 << 20  # bytes
_BUILD_FILE = 256 << 20  # bytes that a compiler may write
_CORE_FILE = 64 << 20  # bytes that a program may write which may leave a core file

_MAGIC = bytes([wire.MAGIC])

BUSY = "Virtual machine is temporarily unavailable, try again soon."

# Languages whose command line builds a program. It is run afterwards.
_COMPILED = {
    "c89", "c99", "c11", "c2x", "clang89", "clang99", "clang11", "clang2x", "clang", "cpp", "c++", "clangpp", "clang++",
    "tendra", "haskell", "freebasic", "qbasic",
}  # fmt: skip
# Compilers whose programs tell the debugger what they hold, and what they compile.
_TOLD = {
    "c89": "c", "c99": "c", "c11": "c", "c2x": "c", "clang89": "c", "clang99": "c", "clang11": "c", "clang2x": "c",
    "clang": "c", "cpp": "c++", "c++": "c++", "clangpp": "c++", "clang++": "c++",
}  # fmt: skip
# Options with which a compiler makes no program.
_NO_PROGRAM = ("--version", "--analyze")


class OnNative(Protocol):
    """Takes over a descriptor from which `first` was read, and calls `on_end`, with what was no frame, when it ends."""

    def __call__(self, fd: int, transport: str, *, first: bytes, on_end: Callable[[bytes], None]) -> object:
        """Begin."""


class Server:
    """Runs programs for legacy peers, and knows whether the machine is still clean.

    `host_busy` tells whether the host has a run of its own under way: then nobody else gets the machine. `on_native`
    takes over a stream on which a frame begins where a line should: the first byte of a frame is in no text.
    """

    def __init__(self, loop: Loop, owner: Owner, host_busy: Callable[[], bool], on_native: OnNative) -> None:
        self.loop = loop
        self.on_native = on_native
        self._owner = owner
        self._host_busy = host_busy
        self._runs = 0
        self._connections = 0
        self.used = False  # a program of a legacy peer has run here

    def serial(self, fd: int) -> None:
        """Serve a serial line, which ends its lines as a tty does."""
        Conversation(self, fd, newline=b"\r\n", on_close=None)

    def listen(self, port: int) -> None:
        """Serve vsock `port`, one request for each connection. Raises OSError when this guest cannot."""
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        listener.bind((socket.VMADDR_CID_ANY, port))
        listener.listen(_CONNECTIONS_MAX)
        listener.setblocking(False)
        self.loop.watch(listener.fileno(), READ, lambda _events: self._accept(listener))

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, peer = listener.accept()
        except OSError:
            return
        if peer[0] != socket.VMADDR_CID_HOST or self._connections >= _CONNECTIONS_MAX:
            sock.close()  # programs in this guest have no business here
            return
        self.connection(sock.detach())

    def connection(self, fd: int) -> None:
        """Serve one request on a stream of its own."""
        self._connections += 1
        Conversation(self, fd, newline=b"\n", on_close=self._closed)

    def _closed(self) -> None:
        self._connections -= 1

    def run(self, block: bytes, answer: Callable[[str], None]) -> None:
        """Carry out one request and hand its result to `answer`, at once or later."""
        if self._host_busy():
            answer(BUSY)
            return
        try:
            request = parse(block)
        except BadRequest as exc:
            answer(str(exc))
            return
        self._runs += 1
        self.used = True
        _Execution(self.loop, self._owner, _FIRST_ID + self._runs, request, answer)


class BadRequest(Exception):  # noqa: N818 - its text is a result, not a fault of ours
    """A request that cannot be followed; the text is the result."""


class Request:
    """What a legacy peer wants to have run."""

    def __init__(self, run: spec.RunSpec, content: bytes, stdin: bytes, *, factoid: bool) -> None:
        self.spec = run
        self.content = content
        self.stdin = stdin
        self.factoid = factoid


def parse(block: bytes) -> Request:
    """Return the request in the bytes of one block. Raises BadRequest."""
    try:
        value = json.loads(block.decode("utf-8", "replace"), strict=False)
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"Failed to decode JSON: {exc}") from None
    if not isinstance(value, dict):
        raise BadRequest("Failed to decode JSON: not an object")

    def text(key: str) -> str:
        found = value.get(key)
        # JSON can spell half a surrogate pair, which no program could be given.
        return found.encode("utf-8", "replace").decode() if isinstance(found, str) else ""

    language, command = text("lang"), text("cmdline")
    if not command.strip():
        raise BadRequest("[Fatal error]")
    code = text("code").encode() + b"\n"
    stdin = text("input")
    compiled = language in _COMPILED or language == "java"
    source, program = text("sourcefile") or "prog", text("execfile") or "prog"
    limits: dict[str, object] = {
        "wall": _WALL,
        "cpu": _WALL if compiled else _CPU,
        "memory": 0,
        "processes": _PROCESSES,
        "file_size": _BUILD_FILE if compiled else _FILE << 10,
        "output": _OUTPUT,
    }
    table: dict[str, object] = {
        "files": [{"name": source, "size": len(code)}],
        "stdin": bool(stdin),
        "limits": limits,
    }
    if told := _told(language, command, source, program, text("arguments")):
        table |= told
        limits |= {"build": _WALL, "wall": _GDB_WALL, "file_size": _CORE_FILE}
    else:
        table["steps"] = _steps(language, command, program, text("arguments"))
    try:
        checked = spec.parse(table)
    except spec.BadRequestError as exc:
        raise BadRequest(f"[Fatal error] {exc}") from None
    return Request(checked, code, stdin.encode() + b"\n" if stdin else b"", factoid="factoid" in value)


def _told(language: str, command: str, source: str, program: str, arguments: str) -> dict[str, object]:
    """Return how C and C++ are built, run and looked at; nothing for a command line that makes no such program."""
    compiler = list(words.split(command))
    if language not in _TOLD or compiler.count(source) != 1 or any(option in compiler for option in _NO_PROGRAM):
        return {}
    compiler[compiler.index(source)] = f".{source}"
    if compiler[0].startswith("clang++-"):  # a release that was never in this guest
        compiler[0] = "clang++"
    wanted = {"kind": _TOLD[language], "source": source, "flags": ["-nomain"], "headers": []}
    run = [f"./{program}", *words.split(arguments, resolve=True)]
    return {
        "steps": [[f"{spec.OWN}build", json.dumps(wanted), *compiler], [f"{spec.OWN}run", *run]],
        "report": [f"{spec.OWN}report", f"./{program}"],
        "env": {"UBSAN_OPTIONS": "strip_path_prefix=/"},
    }


def _steps(language: str, command: str, program: str, arguments: str) -> list[list[str]]:
    """Return what is to be run: the command line in a shell of this guest, and after a build the program."""
    if language not in _COMPILED and language != "java":
        return [["bash", "-c", " ".join([command, *(shlex.quote(word) for word in words.split(arguments))])]]
    steps = [["bash", "-c", command]]
    if any(option in command.split() for option in _NO_PROGRAM):
        return steps
    run = ["java", program] if language == "java" else [f"./{program}"]
    limited = f'ulimit -t {_CPU} -f {_FILE}; exec "$@"'
    return [*steps, ["bash", "-c", limited, "bash", *run, *words.split(arguments, resolve=True)]]


class _Execution:
    """One run, whose frames become a text. It stands where the port to the host would be."""

    full = False

    def __init__(self, loop: Loop, owner: Owner, id_: int, request: Request, answer: Callable[[str], None]) -> None:
        self._request = request
        self._answer = answer
        self._build = bytearray()
        self._output = bytearray()
        self._stdin = memoryview(request.stdin)
        self._stdin_open = request.spec.stdin
        self._room = wire.STDIN_WINDOW
        self._run: Run | None = None
        self._ended = False
        try:
            # It is a port in all that a run needs of one.
            self._run = Run(loop, self, id_, request.spec, owner, lambda _id: None)  # type: ignore[arg-type]
            self._run.data(request.content)
            self._feed()
        except OSError as exc:
            if self._run:
                self._run.close()
            self._end(f"[Fatal error] {exc.strerror}")

    def send(self, frame: bytes, *, urgent: bool = False) -> None:
        """Take a frame that would go to the host."""
        del urgent
        _magic, type_, _id, _length = wire.HEADER.unpack_from(frame)
        payload = frame[wire.HEADER.size :]
        if type_ in (FrameType.STDOUT, FrameType.STDERR):
            (self._build if self._run and self._run.building else self._output).extend(payload)
            if self._run:
                self._run.credit(wire.cost(payload))
        elif type_ == FrameType.CREDIT:
            self._room += wire.credit(wire.Frame(type_, 0, payload))
            self._feed()
        elif type_ == FrameType.EXIT:
            exit_ = wire.decode_json(payload)
            if self._request.spec.report and exit_.get("timed_out"):
                self._end("[gdb time-out]")
                return
            self._end(result(exit_, bytes(self._build), bytes(self._output), factoid=self._request.factoid))

    def _feed(self) -> None:
        """Give the program as much input as it may have now, and then the end of it."""
        while self._run and self._stdin_open and self._room > 0:
            piece = self._stdin[: min(self._room, wire.CHUNK)]
            self._stdin = self._stdin[len(piece) :]
            self._room -= len(piece)
            self._stdin_open = bool(piece)
            self._run.stdin(bytes(piece))

    def _end(self, text: str) -> None:
        if not self._ended:
            self._ended = True
            self._answer(text)


def result(exit_: dict[str, object], build: bytes, output: bytes, *, factoid: bool) -> str:
    """Return the text for a run that ended, as the predecessor's guest words it."""
    if exit_.get("timed_out"):
        return "[Timed-out]"
    if exit_.get("message"):
        return f"[Fatal error] {exit_['message']}"
    said = build.decode("utf-8", "replace")
    if said and exit_.get("stage") == "build":  # a compiler's own words are enough
        return said
    signal = exit_.get("signal")
    code = 128 + signal if isinstance(signal, int) else exit_.get("status")
    notes = f"[{said.strip()}]\n" if said.strip() else ""
    text = output.decode("utf-8", "replace")
    if text:
        return f"{notes}{text} [Exit {code}]" if code else notes + text
    if factoid:
        return notes
    ended = f"Exit {code}." if code else "Success (no output)."
    return f"{notes}\n{ended}" if notes else ended


class Conversation:
    """One stream on which a legacy peer asks. With `on_close` it ends after one answer, and says so."""

    def __init__(self, server: Server, fd: int, *, newline: bytes, on_close: Callable[[], None] | None) -> None:
        self._server = server
        self._fd = fd
        self._newline = newline
        self._on_close = on_close
        self._line = bytearray()
        self._block = bytearray()
        self._too_long = False
        self._requests: deque[bytes | None] = deque()  # None: one that was too long
        self._busy = False
        self._out = memoryview(b"")
        self._ended = False
        os.set_blocking(fd, False)
        server.loop.watch(fd, READ, self._ready)

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if events & READ and not self._ended:
            self._receive()

    def _receive(self) -> None:
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._hang_up()
            return
        self.take(data)

    def take(self, data: bytes) -> None:
        """Take what the peer has sent: lines, or frames where a request would begin."""
        start = 0
        while start < len(data):
            if not self._line:
                self._next()
            if not (self._line or self._block or self._busy or self._requests) and data[start] == wire.MAGIC:
                self._hand_over(data[start:])
                return
            end = data.find(b"\n", start)
            self._line += data[start : end if end >= 0 else len(data)].replace(b"\r", b"")
            if end < 0:
                break
            self._take(bytes(self._line))
            self._line.clear()
            start = end + 1
        if len(self._block) + len(self._line) > REQUEST_MAX:
            self._too_long = True
            self._block.clear()
            self._line = self._line[-16:]  # enough to know the end of it
        self._next()

    def _hand_over(self, data: bytes) -> None:
        """Leave the stream to frames. A serial line comes back when they end, a connection is over then."""
        self._server.loop.watch(self._fd, 0, self._ready)
        if self._on_close:
            self._server.on_native(self._fd, "vsock", first=data, on_end=lambda _rest: self._close())
        else:
            self._server.on_native(self._fd, "isa-serial", first=data, on_end=self._take_back)

    def _take_back(self, rest: bytes) -> None:
        """Go on with text on a serial line: `rest` is what was no frame, however it begins."""
        # Not at once: a piece full of bad frames would have this call itself for each of them.
        self._server.loop.after(0, lambda: self._go_on(rest.lstrip(_MAGIC)))

    def _go_on(self, rest: bytes) -> None:
        self._server.loop.watch(self._fd, READ, self._ready)
        self.take(rest)

    def _take(self, line: bytes) -> None:
        """Take one line; the one that ends a request completes it."""
        if line and line != b":end:":
            if len(self._block) + len(line) > REQUEST_MAX:
                self._too_long = True
            if not self._too_long:
                self._block += line
            return
        if self._too_long or self._block:
            if len(self._requests) < _WAITING_MAX:
                self._requests.append(None if self._too_long else bytes(self._block))
            self._too_long = False
            self._block.clear()

    def _next(self) -> None:
        if self._busy or not self._requests:
            return
        self._busy = True
        block = self._requests.popleft()
        if block is None:
            self._answer(f"[Fatal error] the request is longer than {REQUEST_MAX} bytes")
        else:
            self._server.run(block, self._answer)

    def _answer(self, text: str) -> None:
        if not text.endswith("\n"):
            text += "\n"
        line = b"result:" + json.dumps({"result": text}, ensure_ascii=False).encode("utf-8", "replace")
        self._out = memoryview(line + self._newline + b"result:end" + self._newline)
        self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                self._out = self._out[os.write(self._fd, self._out) :]
        except BlockingIOError:
            self._server.loop.watch(self._fd, (0 if self._ended else READ) | WRITE, self._ready)
            return
        except OSError:  # the peer is gone
            self._out = memoryview(b"")
        if not self._busy:
            return
        self._busy = False
        if self._on_close:
            self._close()
            return
        self._server.loop.watch(self._fd, READ, self._ready)
        self._server.loop.after(0, self._next)

    def _hang_up(self) -> None:
        """Stop reading: the peer says no more. A serial line comes back, a connection does not."""
        self._server.loop.watch(self._fd, 0, self._ready)
        if not self._on_close:
            self._server.loop.after(0.1, lambda: self._server.loop.watch(self._fd, READ, self._ready))
            return
        self._ended = True
        if not self._busy and not self._requests:
            self._close()

    def _close(self) -> None:
        self._server.loop.watch(self._fd, 0, self._ready)
        self._ended = True
        os.close(self._fd)
        if self._on_close:
            self._on_close()
            self._on_close = None
