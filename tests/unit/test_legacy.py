"""Connections of vsock to the guest: one request each, from the host alone. Unix sockets stand for vsock ones."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import TYPE_CHECKING, Any, cast

import pytest

from pbotvm_qemu.guest import health, legacy, wire
from pbotvm_qemu.guest.child import Owner
from pbotvm_qemu.guest.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HOST, LOCAL, GUEST = 2, 1, 7  # context ids, vsock(7)
SECONDS = 60.0  # for anything that must come

pytestmark = pytest.mark.skipif(not hasattr(socket, "VMADDR_CID_HOST"), reason="this Python knows no vsock")


class Listener:
    """Accepts Unix sockets, and says that they come from a context id."""

    def __init__(self) -> None:
        self.waiting: list[tuple[socket.socket, tuple[int, int]]] = []

    def accept(self) -> tuple[socket.socket, tuple[int, int]]:
        if not self.waiting:
            raise BlockingIOError
        return self.waiting.pop(0)


class Guest:
    """A guest's server and its loop, which goes on only while somebody waits for something."""

    def __init__(self, home: Path) -> None:
        self.loop = Loop()
        self.busy = False
        self.handed: list[tuple[str, bytes, Callable[[bytes], None]]] = []
        owner = Owner(str(home), "nobody", None, None, cgroups=False)
        self.server = legacy.Server(self.loop, owner, host_busy=lambda: self.busy, on_native=self.native)
        self.listener = Listener()
        self.ours: list[socket.socket] = []

    def native(self, fd: int, transport: str, *, first: bytes, on_end: Callable[[bytes], None]) -> None:
        del fd
        self.handed.append((transport, first, on_end))

    def pair(self) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.ours.append(ours)
        return ours, theirs

    def end(self) -> None:
        """Hang up, and let the server see it."""
        for sock in self.ours:
            sock.close()
        self.until(lambda: not self.server._connections)
        self.loop._selector.close()

    def connect(self, cid: int = HOST) -> socket.socket:
        ours, theirs = self.pair()
        self.listener.waiting.append((theirs, (cid, 1234)))
        self.server._accept(cast("socket.socket", self.listener))
        return ours

    def until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not true():
            assert time.monotonic() < end
            self.loop.step(0.05)

    def read(self, sock: socket.socket) -> bytes:
        """Return all that comes until the connection is closed."""
        seen = bytearray()
        closed = False

        def more() -> bool:
            nonlocal closed
            try:
                data = sock.recv(65536)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                data = b""
            seen.extend(data)
            closed = closed or not data
            return closed

        self.until(more)
        return bytes(seen)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    made = Guest(tmp_path)
    yield made
    made.end()


def request(code: str, **changes: Any) -> bytes:
    value = {"lang": "sh", "sourcefile": "prog.sh", "execfile": "prog.sh", "cmdline": "sh prog.sh", "code": code}
    return json.dumps(value | changes).encode()


def answer(text: str) -> bytes:
    """Return an answer as it goes over vsock, which needs no carriage return."""
    return f"result:{json.dumps({'result': text})}\nresult:end\n".encode()


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\n:end:\n"])
def test_a_connection_has_one_answer_and_is_closed(guest: Guest, end: bytes) -> None:
    sock = guest.connect()
    sock.sendall(request("echo hi") + end)
    assert guest.read(sock) == answer("hi\n")


def test_what_follows_the_first_request_is_not_run(guest: Guest, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    sock = guest.connect()
    sock.sendall(request("echo one") + b"\n\n" + request(f"echo two; touch {mark}") + b"\n\n")
    assert guest.read(sock) == answer("one\n")
    assert not mark.exists()


def test_connections_are_served_at_the_same_time(guest: Guest, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    first, second = guest.connect(), guest.connect()
    first.sendall(request(f"read x <{tmp_path}/gate; echo $x") + b"\n\n")
    second.sendall(request(f"echo through >{tmp_path}/gate; echo second") + b"\n\n")
    assert guest.read(second) == answer("second\n")
    assert guest.read(first) == answer("through\n")


def test_a_peer_that_closes_its_half_is_answered(guest: Guest) -> None:
    sock = guest.connect()
    sock.sendall(request("echo hi") + b"\n\n")
    sock.shutdown(socket.SHUT_WR)
    assert guest.read(sock) == answer("hi\n")


def test_a_peer_that_leaves_frees_its_place(guest: Guest) -> None:
    for _ in range(3 * legacy._CONNECTIONS_MAX):
        sock = guest.connect()
        sock.sendall(b"half a request\n")
        sock.close()
        guest.until(lambda: not guest.server._connections)
    sock = guest.connect()
    sock.sendall(request("echo served") + b"\n\n")
    assert guest.read(sock) == answer("served\n")


def test_a_peer_that_leaves_before_its_answer_harms_nobody(guest: Guest) -> None:
    sock = guest.connect()
    sock.sendall(request("echo lost") + b"\n\n")
    guest.loop.step(1)
    sock.close()
    guest.until(lambda: not guest.server._connections)


def test_programs_of_this_guest_are_not_let_in(guest: Guest) -> None:
    for cid in (LOCAL, GUEST):
        assert guest.read(guest.connect(cid)) == b""
    assert guest.server._connections == 0


def test_connections_are_counted(guest: Guest) -> None:
    kept = [guest.connect() for _ in range(legacy._CONNECTIONS_MAX)]
    assert guest.read(guest.connect()) == b""
    kept[0].close()
    guest.until(lambda: guest.server._connections < legacy._CONNECTIONS_MAX)
    sock = guest.connect()
    sock.sendall(request("echo served") + b"\n\n")
    assert guest.read(sock) == answer("served\n")


def test_while_the_host_has_a_run_of_its_own_nobody_else_gets_the_machine(guest: Guest) -> None:
    guest.busy = True
    sock = guest.connect()
    sock.sendall(request("echo hi") + b"\n\n")
    assert guest.read(sock) == answer(f"{legacy.BUSY}\n")
    assert not guest.server.used


def test_a_frame_instead_of_a_line_is_handed_over_and_keeps_its_place(guest: Guest) -> None:
    sock = guest.connect()
    frame = wire.encode_json(wire.FrameType.HELLO, 0, {"nonce": "x"})
    sock.sendall(frame)
    guest.until(lambda: bool(guest.handed))
    ((transport, first, on_end),) = guest.handed
    assert (transport, first, guest.server._connections) == ("vsock", frame, 1)
    on_end(b"")
    assert guest.read(sock) == b""
    assert guest.server._connections == 0


def test_an_answer_that_is_read_slowly_arrives_whole(guest: Guest) -> None:
    sock = guest.connect()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.sendall(request("head -c 900000 /dev/zero | tr '\\0' x") + b"\n\n")
    text = json.loads(guest.read(sock).split(b"\n")[0][len(b"result:") :])["result"]
    assert text == "x" * 900000 + "\n"


def test_health_beats_and_then_answers_with_the_end_that_the_host_wants(guest: Guest) -> None:
    ours, theirs = guest.pair()
    health.Health(guest.loop, theirs.detach(), connection=True)
    assert ours.recv(10) == b"\r\n"
    ours.sendall(b"\n")
    seen = bytearray()

    def ended() -> bool:
        try:
            seen.extend(ours.recv(4096))
        except BlockingIOError:
            return False
        return seen.endswith(b"\r\n")

    guest.until(lambda: ended() and seen.endswith(b"\r\n:END\r\n"))
    ours.shutdown(socket.SHUT_WR)
    assert guest.read(ours) == b""
