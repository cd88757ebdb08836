"""Which transport is taken, and what a daemon's socket may answer, with the real agent or a peer that breaks off."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import config, transports
from pbotvm_qemu.errors import GuestError
from pbotvm_qemu.guest import wire
from tests.compat import peers
from tests.compat.peers import SECONDS, frame_today, request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def agent() -> Iterator[peers.Agent]:
    with peers.agent() as running:
        yield running


def test_the_configuration_knows_every_transport() -> None:
    for name in (transports.AUTO, *transports.NAMES):
        assert config.override(config.Config(), "pool", transport=name).pool.transport == name


async def test_the_first_that_answers_is_taken(agent: peers.Agent) -> None:
    reached = await transports.choose([transports.VirtioSerial(agent.channel)], SECONDS)
    assert (reached.hello.transport, reached.why) == ("virtio-serial", "")
    await reached.channel.close()


async def test_the_next_one_is_taken_and_the_reason_is_kept(agent: peers.Agent, tmp_path: Path) -> None:
    refused = transports.VhostUserVsock(tmp_path / "nobody", 5555)
    silent, theirs = socket.socketpair()
    ways: list[transports.Transport] = [
        refused, transports.IsaSerial(silent), transports.VirtioSerial(agent.channel)
    ]  # fmt: skip
    refused.patience = 0.3
    reached = await transports.choose(ways, SECONDS, problem="known before")
    assert reached.hello.transport == "virtio-serial"
    assert reached.why.startswith("known before; vhost-user-vsock: ")
    assert "isa-serial: " in reached.why
    await reached.channel.close()
    silent.close()
    theirs.close()


async def test_who_refuses_is_given_up_long_before_who_is_silent(agent: peers.Agent, tmp_path: Path) -> None:
    """A closed socket, a guest in which nobody listens, and one that hangs up when it is spoken to."""
    for answer in (None, b"", b"OK 1\n"):
        path = tmp_path / f"guest-{answer!r:.3}"
        async with AsyncExitStack() as stack:
            if answer is not None:
                await stack.enter_async_context(Daemon(path, answer))
            refusing = transports.VhostUserVsock(path, 5555)
            refusing.patience = 1000 * SECONDS
            async with asyncio.timeout(SECONDS):
                reached = await transports.choose([refusing, transports.VirtioSerial(agent.channel)], SECONDS * 2000)
            assert reached.hello.transport == "virtio-serial"
            assert "vhost-user-vsock: " in reached.why
            assert "no answer" not in reached.why
            await reached.channel.close()


def test_a_slow_guest_is_given_more_time_for_its_first_answer(tmp_path: Path) -> None:
    def patience(found: float | None) -> float:
        return transports.VhostUserVsock(tmp_path, 5555, found=found).patience

    assert patience(0.01) < patience(0.4) < patience(30) == patience(None)


async def test_who_refuses_at_first_is_asked_again(agent: peers.Agent, tmp_path: Path) -> None:
    """A guest that was just restored may refuse a connection or two."""
    path = tmp_path / "guest"

    async def listen() -> None:
        await asyncio.sleep(0.2)
        await stack.enter_async_context(Daemon(path, b"OK 1\n", agent))

    async with AsyncExitStack() as stack:
        later = asyncio.create_task(listen())
        reached = await transports.reach(transports.VhostUserVsock(path, 5555), SECONDS)
        assert reached.hello.transport == "vhost-user-vsock"
        await later
        await reached.channel.close()


class Fading:
    """Refuses the first connection, and then says nothing any more."""

    name: transports.Name = "vsock"
    connects = True
    patience = 0.5
    prelude = b""

    def __init__(self) -> None:
        self.asked = 0

    async def connect(self) -> socket.socket:
        self.asked += 1
        if self.asked == 1:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        await asyncio.Event().wait()
        raise AssertionError


async def test_silence_after_a_refusal_does_not_hide_it() -> None:
    fading = Fading()
    with pytest.raises(GuestError, match=r"vsock: .*Connection reset by peer"):
        await transports.reach(fading, 0.5, refusals=0.3)
    assert fading.asked > 1


async def test_when_none_answers_the_last_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="vhost-user-vsock: "):
        await transports.choose([transports.VhostUserVsock(tmp_path / "nobody", 5555)], 0.3)


async def test_a_stream_can_be_opened_again_and_again(agent: peers.Agent) -> None:
    """The rest of a frame that the first host left swallows the second one's first question."""
    way = transports.VirtioSerial(agent.channel)
    sock = await way.connect()
    sock.setblocking(True)
    sock.sendall(wire.encode(wire.FrameType.PING, 1, bytes(5000))[:-20])
    sock.close()
    for _ in range(2):
        reached = await transports.reach(way, SECONDS)
        assert await reached.channel.ping(timeout=SECONDS) > 0
        await reached.channel.close()


class Daemon:
    """A UNIX socket that answers CONNECT as it is told, and then passes the bytes on to an agent."""

    def __init__(self, path: Path, answer: bytes, agent: peers.Agent | None = None) -> None:
        self.path = path
        self.asked = b""
        self._answer = answer
        self._agent = agent
        self._served: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Daemon:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._server.close()
        for task in self._served:
            task.cancel()
        await asyncio.gather(*self._served, return_exceptions=True)
        await asyncio.sleep(0)  # for asyncio to close what was let go

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._served.add(task)
        try:
            self.asked = await reader.readline()
            writer.write(self._answer)
            if self._agent:
                theirs = await asyncio.open_connection(sock=self._agent.channel.dup())
                try:
                    await asyncio.gather(_copy(reader, theirs[1]), _copy(theirs[0], writer))
                finally:
                    theirs[1].close()
        finally:
            writer.close()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(4096):
        target.write(data)
    target.close()


async def test_a_daemon_is_asked_for_the_port_of_the_agent(agent: peers.Agent, tmp_path: Path) -> None:
    async with Daemon(tmp_path / "guest", b"OK 1234\n", agent) as daemon:
        reached = await transports.reach(transports.VhostUserVsock(daemon.path, 5555), SECONDS)
        assert daemon.asked == b"CONNECT 5555\n"
        assert reached.hello.transport == "vhost-user-vsock"
        await reached.channel.close()


@pytest.mark.parametrize("answer", [b"", b"NO\n", b"O" * 1000, b"OK 12"])
async def test_what_is_no_consent_of_a_daemon_is_refused(answer: bytes, tmp_path: Path) -> None:
    async with Daemon(tmp_path / "guest", answer) as daemon:
        with pytest.raises(GuestError):
            await transports.reach(transports.VhostUserVsock(daemon.path, 5555), 0.3)


@pytest.mark.parametrize(
    "left", [b"", b"half a line", b'{"code": "half a request"}\n', b"\xf5", b"\xf5\x03\x00\x00\x00\x01"]
)
async def test_frames_and_text_share_the_serial_line(agent: peers.Agent, left: bytes) -> None:
    """Whatever was left half said on it, a host is answered; and after it PBot's vm-exec is."""
    line, theirs = socket.socketpair()
    way = transports.IsaSerial(line)
    pump = asyncio.gather(
        *(_pump(one, other) for one, other in ((theirs.fileno(), agent.serial), (agent.serial, theirs.fileno())))
    )
    os.write(agent.serial, left)
    reached = await transports.reach(way, SECONDS)
    assert (reached.hello.transport, await reached.channel.ping(timeout=SECONDS) > 0) == ("isa-serial", True)
    await reached.channel.close()
    line.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(line, b"\n" + frame_today(request(code="echo text again")))
    heard = b""
    async with asyncio.timeout(SECONDS):
        while not heard.endswith(b"result:end\r\n"):
            heard += await loop.sock_recv(line, 4096)
    assert b"text again" in heard
    pump.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await pump
    line.close()
    theirs.close()


async def _pump(source: int, target: int) -> None:
    """Copy what comes on one descriptor to another."""
    os.set_blocking(source, False)
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(source, ready.set)
    try:
        while True:
            await ready.wait()
            ready.clear()
            try:
                data = os.read(source, 1024)
            except BlockingIOError:
                continue
            os.write(target, data)
    finally:
        loop.remove_reader(source)
