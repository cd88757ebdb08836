"""What reads bytes of a peer, as functions of bytes: for hypothesis in the suite, and for `scripts/fuzz`.

A target feeds its input to the real reader in pieces, and fails when something is raised that the reader does not
promise, when more is kept than its limit, or when the pieces make a difference.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from pbotvm_qemu import pbot_guest, request
from pbotvm_qemu.channel import COLLECT_MAX, Channel
from pbotvm_qemu.errors import GuestError, NeverRanError, RunLostError, UsageError
from pbotvm_qemu.guest import agent, child, health, legacy, loop, network, spec, wire
from pbotvm_qemu.guest.wire import FrameType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_FRAME_MAX = wire.HEADER.size + wire.PAYLOAD_MAX
_PIECES = (1, 3, wire.HEADER.size, 64, 1000, 1 << 16)
_LIMIT = 2000  # bytes of an answer of PBot's guest


@dataclass(frozen=True, slots=True)
class Target:
    """A reader: whose end of a conversation it is, how it is fed, and what real peers send."""

    side: str  # "host" or "guest"
    feed: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


def pieces(data: bytes) -> Iterator[bytes]:
    """Return the input, but for its first byte, in pieces as that byte says: any peer may cut its stream anywhere."""
    size = _PIECES[data[0] % len(_PIECES)] if data else 1
    for start in range(1, len(data), size):
        yield data[start : start + size]


# both ----------------------------------------------------------------------------------------------------------------


def decoder(data: bytes) -> None:
    """Feed the decoder of frames: what it gives is what was sent, and it keeps less than a frame."""
    whole, cut = wire.Decoder(), wire.Decoder()
    frames: list[wire.Frame] = []
    failed = 0
    try:
        for piece in pieces(data):
            frames += cut.feed(piece)
            assert len(cut._buffer) < _FRAME_MAX
    except wire.WireError:
        failed = 1
    try:
        assert whole.feed(data[1:]) == frames
        assert not failed
    except wire.WireError:
        assert failed
    assert data[1:].startswith(b"".join(wire.encode(*frame) for frame in frames))
    for frame in frames:
        with contextlib.suppress(wire.WireError):
            wire.credit(frame)
        with contextlib.suppress(wire.WireError):
            wire.decode_json(frame.payload)


NONCE = "0123456789abcdef"
_HELLO = wire.encode_json(FrameType.HELLO, 0, {"nonce": NONCE, "protocol": wire.VERSION})


def hello(data: bytes) -> None:
    """Feed the decoder that waits for an answer: it keeps next to nothing of what it skips, and finds it."""
    waiting = wire.Decoder()
    waiting.expect_hello(NONCE)
    with contextlib.suppress(wire.WireError):
        for piece in pieces(data):
            waiting.feed(piece)
            assert len(waiting._buffer) < _FRAME_MAX
        if waiting._nonce is not None:
            assert len(waiting._buffer) <= wire.HEADER.size + len(waiting._nonce)
            assert waiting.feed(_HELLO)[0].type == FrameType.HELLO


# the host's end ------------------------------------------------------------------------------------------------------


class _Writer:
    """Stands for a stream whose peer takes everything."""

    def write(self, data: bytes) -> None:
        """Take it."""

    async def drain(self) -> None:
        """Never wait."""

    def close(self) -> None:
        """Do nothing."""

    @property
    def transport(self) -> _Writer:
        """What could be closed at once."""
        return self

    abort = close

    async def wait_closed(self) -> None:
        """Never wait."""


_RUN = spec.RunSpec((), (("true",),), {}, False, spec.Limits(9.0, 9.0, 0, 9, 9, 9), ("a", "b"))


async def _converse(data: bytes) -> None:
    reader = asyncio.StreamReader(limit=1 << 18)
    channel = Channel(reader, cast("asyncio.StreamWriter", _Writer()))
    shown = 0

    async def show(_stream: str, piece: bytes) -> None:
        nonlocal shown
        shown += len(piece)

    for piece in pieces(data):
        reader.feed_data(piece)
    reader.feed_eof()
    try:
        outcome = await channel.execute(_RUN, [], on_output=show)
        assert all(len(content) <= COLLECT_MAX for content in outcome.files.values())
        assert 0 <= outcome.exit_code <= 255
        json.dumps(outcome.to_json(), allow_nan=False)
    except (GuestError, NeverRanError, RunLostError):
        pass
    finally:
        await channel.close()
    assert shown <= len(data)
    assert not channel._pending


_loop: asyncio.AbstractEventLoop | None = None


def channel(data: bytes) -> None:
    """Let the input be everything that a guest says in answer to a run."""
    global _loop  # noqa: PLW0603 - a loop for each of a million inputs would be most of the work
    if _loop is None:
        _loop = asyncio.new_event_loop()
    _loop.run_until_complete(_converse(data))


def results(data: bytes) -> None:
    """Let the input be the answer of PBot's guest."""
    answers: list[str | None] = []
    for cut in (pieces(data), iter([data[1:]])):
        reader = pbot_guest.Results(limit=_LIMIT)
        try:
            for piece in cut:
                reader.feed(piece)
                assert len(reader._buffer) <= _LIMIT + len(piece)
                if reader.done:
                    break
            reader.close()
            assert len(reader.text) <= 8 * _LIMIT + len(data)
            answers.append(reader.text)
        except GuestError:
            answers.append(None)
    assert None in answers or answers[0] == answers[1]


def line(data: bytes) -> None:
    """Let the input be the line of a PBot client."""
    found: request.Request | None
    try:
        found = request.parse_line(data.decode("utf-8", "replace"))
    except UsageError as exc:
        found = getattr(exc, "request", None)
    if found is not None:
        found.code.encode()
        " ".join((*found.options, *found.arguments, found.stdin or "", found.language, found.nick)).encode()


# the guest's end -----------------------------------------------------------------------------------------------------


class _Run:
    """Stands for a program that never says anything; the real one would be run."""

    def __init__(
        self, _loop: object, _port: object, id_: int, request: spec.RunSpec, *_rest: object, folder: str
    ) -> None:
        assert id_
        assert "/" not in folder
        self.done = False
        self._room = sum(file.size for file in request.files)

    def data(self, payload: bytes) -> None:
        self._room -= len(payload)
        if self._room < 0:
            raise wire.WireError("more file data than the run frame announced")

    def stdin(self, payload: bytes) -> None:
        assert len(payload) <= wire.PAYLOAD_MAX

    def credit(self, count: int) -> None:
        assert 0 <= count < 1 << 32

    def signal(self, number: int) -> None:
        assert isinstance(number, int)

    def cancel(self) -> None:
        self.done = True

    def resume(self) -> None:
        pass

    def close(self) -> None:
        self.done = True


class _Guest:
    """The agent with its effects on this machine taken away: programs, clock, random numbers, name, network."""

    def __init__(self) -> None:
        self.BadNetworkError = network.BadNetworkError
        self.owner = child.Owner("/nonexistent", "nobody", None, None, cgroups=False)

    def memory_total(self) -> int:
        return 1 << 28

    def set_clock(self, clock_ns: int) -> None:
        assert 0 < clock_ns < 1 << 63

    def add_entropy(self, data: bytes) -> None:
        assert 32 <= len(data) <= 512

    def set_hostname(self, name: str) -> None:
        assert name.isascii() or name.replace("-", "").isalnum()

    def resume(self, value: object) -> None:
        if value is not False:
            network.parse(value)


@contextlib.contextmanager
def _harmless() -> Iterator[None]:
    """Keep the agent from acting on this machine."""
    kept = {name: agent.__dict__.get(name) for name in ("Run", "system", "network", "print")}
    agent.__dict__.update(Run=_Run, system=_guest, network=_guest, print=lambda *_words, **_options: None)
    try:
        yield
    finally:
        agent.__dict__.update(kept)
        if kept["print"] is None:
            del agent.__dict__["print"]


def _exchange(data: bytes, serve: Callable[[loop.Loop, int], object]) -> None:
    """Send the input to what `serve` puts on a descriptor, and let it work until all is read."""
    with _harmless():
        _exchange_with(data, serve)


def _exchange_with(data: bytes, serve: Callable[[loop.Loop, int], object]) -> None:
    ours, theirs = socket.socketpair()
    work = loop.Loop()
    fd = theirs.detach()
    try:
        ours.setblocking(False)
        serve(work, fd)
        for piece in pieces(data):
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                ours.send(piece)
            work.step(0)
            with contextlib.suppress(BlockingIOError, ConnectionResetError):
                ours.recv(1 << 18)
    finally:
        ours.close()
        work.step(0)
        work._selector.close()
        with contextlib.suppress(OSError):
            os.close(fd)


_guest = _Guest()


def frames(data: bytes) -> None:
    """Let the input be everything that a host says to the agent on its port."""
    served: list[agent.Peer] = []

    def serve(work: loop.Loop, fd: int) -> None:
        served.append(agent.Agent(work, _guest.owner).serve(fd, "virtio-serial"))

    _exchange(data, serve)
    _check(served[0])


def _check(peer: agent.Peer) -> None:
    assert len(peer.runs) <= wire.RUNS_MAX
    assert len(peer._port._decoder._buffer) < _FRAME_MAX


class _Server:
    """Stands for the runner of programs for PBot's peers: answers with what it understood."""

    def __init__(self, work: loop.Loop) -> None:
        self.loop = work
        self.peers: list[agent.Peer] = []
        self._agent = agent.Agent(work, _guest.owner)

    def on_native(self, fd: int, transport: str, *, first: bytes, on_end: Callable[[bytes], None]) -> None:
        self.peers.append(self._agent.serve(fd, transport, first=first, on_end=on_end))

    def run(self, block: bytes, answer: Callable[[str], None]) -> None:
        assert len(block) <= legacy.REQUEST_MAX
        try:
            understood = legacy.parse(block)
        except legacy.BadRequest as exc:
            answer(str(exc))
        else:
            spec.parse(understood.spec.to_json())
            answer(understood.content.decode("utf-8", "replace"))


def vm_exec(data: bytes) -> None:
    """Let the input be what a PBot host, or one of ours, says on the serial line."""
    served: list[legacy.Conversation] = []
    servers: list[_Server] = []

    def serve(work: loop.Loop, fd: int) -> None:
        servers.append(_Server(work))
        served.append(legacy.Conversation(cast("legacy.Server", servers[0]), fd, newline=b"\r\n", on_close=None))

    _exchange(data, serve)
    for peer in servers[0].peers:
        _check(peer)
    assert len(served[0]._block) + len(served[0]._line) <= legacy.REQUEST_MAX + (1 << 16)
    assert len(served[0]._requests) <= 16


def heartbeat(data: bytes) -> None:
    """Let the input be what a PBot host says on the health port."""
    _exchange(data, health.Health)


# what real peers send ------------------------------------------------------------------------------------------------


def _json(type_: int, id_: int, **value: object) -> bytes:
    return wire.encode_json(type_, id_, dict(value))


_REQUEST = _json(
    FrameType.RUN, 1, files=[{"name": "prog.sh", "size": 3}], steps=[["sh", "prog.sh"]], env={"A": "b"}, stdin=True,
    limits={"wall": 10, "cpu": 8, "memory": 1 << 24, "processes": 9, "file_size": 1 << 20, "output": 1 << 20, "build": 2},
    collect=["out"], keep=False, report=["x"],
)  # fmt: skip
_EXIT = _json(
    FrameType.EXIT, 1, status=0, signal=None, timed_out=False, cancelled=False, truncated=False, limit=None,
    stage="run", message="", wall_s=0.1, build_s=0, cpu_s=0.05, memory_peak=123456,
)  # fmt: skip
_NETWORK = {
    "mac": "52:54:00:12:34:56", "addresses": ["10.0.0.2/24", "fd00::2/64"], "gateway4": "10.0.0.1", "gateway6": "fe80::1",
    "dns": ["10.0.0.1"], "mtu": 1500,
}  # fmt: skip
_FROM_HOST = (
    b"\x05" + _json(FrameType.HELLO, 0, nonce=NONCE, protocol=1),
    b"\x05" + _json(FrameType.RESUME, 2, clock_ns=1700000000 * 10**9, entropy="QUJD" * 20, hostname="vm-1", network=_NETWORK),
    b"\x05" + wire.encode(FrameType.PING, 3, b"ping"),
    b"\x05" + _REQUEST + wire.encode(FrameType.DATA, 1, b"id\n") + wire.encode(FrameType.STDIN, 1, b"in")
    + wire.encode(FrameType.STDIN, 1) + wire.encode_credit(1, 4096) + _json(FrameType.SIGNAL, 1, signal=15)
    + _json(FrameType.CANCEL, 1),
    b"\x05" + _json(FrameType.CONTROL, 4, do="status"),
)  # fmt: skip
_FROM_GUEST = (
    b"\x05" + _HELLO,
    b"\x05" + wire.encode(FrameType.STDOUT, 1, b"out\n") + wire.encode(FrameType.STDERR, 1, b"err\n") + _EXIT,
    b"\x05" + _json(FrameType.FILE, 1, name="a", size=3) + wire.encode(FrameType.DATA, 1, b"abc")
    + _json(FrameType.FILE, 1, name="b", error="no such file") + _EXIT,
    b"\x05" + wire.encode_credit(1, 65536) + _json(FrameType.ERROR, 1, code="busy", message="later", hint="wait"),
    b"\x05" + _json(FrameType.ERROR, 1, code="run-lost", message="gone"),
    b"\x05" + _json(FrameType.HELLO, 0, nonce="started"),
)  # fmt: skip
_VM_EXEC = {
    "lang": "sh", "sourcefile": "prog.sh", "execfile": "prog", "cmdline": "sh prog.sh", "input": "in", "date": 1700000000,
    "arguments": "'a b' c", "code": "echo hi", "factoid": "#c:x", "persist-key": 1,
}  # fmt: skip

TARGETS = {
    "decoder": Target("both", decoder, (*_FROM_HOST, *_FROM_GUEST)),
    "hello": Target("both", hello, (*_FROM_GUEST, b"\x01" + _EXIT[:70] + _HELLO)),
    "channel": Target("host", channel, _FROM_GUEST),
    "results": Target(
        "host",
        results,
        (
            b"\x05noise\r\n" + b'result:{"result":"hi\\n"}\r\nresult:end\r\n',
            b'\x01result:{"result":"\xff"}\nmore\nresult:end\nrest',
            b"\x05result:end\n",
        ),
    ),
    "line": Target(
        "host",
        line,
        (
            b'{"nick" :"n" ,"channel" :"#c" ,"code" :"-lang=sh -args \\"a b\\" echo hi -stdin in\\\\n"}',
            b"-lang=c11 -vm=main -Wall -include stdio.h int main; -info -paste -args=x",
            b'{"code": "echo", "persist-key": 5, "factoid": "x", "usage": "u", "token": "t", "arguments": "\'q"}',
        ),
    ),
    "frames": Target("guest", frames, _FROM_HOST),
    "vm-exec": Target(
        "guest",
        vm_exec,
        (
            b"\x05" + pbot_guest.encode(_VM_EXEC),
            b"\x04" + pbot_guest.encode(_VM_EXEC, seed=True) * 2,
            *(seed[:1] + b"\n" + seed[1:] for seed in _FROM_HOST),
        ),
    ),
    "heartbeat": Target("guest", heartbeat, (b"\x05\n", b"\x01\r\n\n", b"\x05x")),
}
