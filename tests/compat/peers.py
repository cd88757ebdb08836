"""The other ends, as PBot has them: its guest-server behind a real tty, its vm-exec, and our agent on this host."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbotvm_qemu import paths
from pbotvm_qemu.channel import Channel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from pbotvm_qemu.channel import OnOutput, Outcome
    from pbotvm_qemu.guest.spec import RunSpec

NOBODY = 65534
SECONDS = 60.0  # for anything that must come; a test that passes waits much less

# Everything is imported before the rights are given up: the interpreter may lie in root's home.
_BOOT = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
uid = int(sys.argv.pop(1))
from guest.agent import main
import guest.source.build
import tarfile
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
main()
"""


class Agent:
    """Our agent, as an ordinary user of this host, with pseudo terminals for its serial lines."""

    def __init__(self) -> None:
        self.top = Path(tempfile.mkdtemp(prefix="pbotvm-compat-", dir="/tmp"))
        home = self.top / "home"
        home.mkdir()
        self.channel, theirs = socket.socketpair()
        self.serial, serial = pty.openpty()
        self.health, health = pty.openpty()
        names = [os.ttyname(serial), os.ttyname(health)]
        if os.geteuid() == 0:
            self.top.chmod(0o755)
            for path in (str(home), *names):
                os.chown(path, NOBODY, NOBODY)
        fd = theirs.fileno()
        with theirs, (self.top / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-I", "-c", _BOOT, str(paths.guest_package().parent), str(NOBODY),
                    f"fd={fd}", f"home={home}", "user=nobody", f"legacy={names[0]}", f"health={names[1]}",
                ],
                pass_fds=[fd], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self._slaves = (serial, health)  # held open, as the machine holds its lines

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.channel.close()
        for fd in (self.serial, self.health, *self._slaves):
            os.close(fd)
        shutil.rmtree(self.top, ignore_errors=True)


@contextlib.contextmanager
def agent() -> Iterator[Agent]:
    running = Agent()
    try:
        yield running
    finally:
        running.end()


class HostPool:
    """Stands for a pool where a test is about callers: runs programs through the real agent on this host."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.problem: str | None = None
        self.fail: Callable[[], Exception] | None = None

    async def run(
        self,
        spec: RunSpec,
        content: Sequence[bytes],
        *,
        on_output: OnOutput,
        stdin: AsyncIterator[bytes] | None = None,
        caller: str = "",
    ) -> Outcome:
        del caller
        if self.fail:
            raise self.fail()
        return await self._channel.execute(spec, content, on_output=on_output, stdin=stdin)

    def status(self) -> dict[str, object]:
        return {"problem": self.problem}


@contextlib.asynccontextmanager
async def host_pool() -> AsyncIterator[HostPool]:
    with agent() as running:
        channel = await Channel.open(running.channel)
        try:
            await channel.handshake(SECONDS)
            yield HostPool(channel)
        finally:
            await channel.close()


def request(**changes: object) -> dict[str, object]:
    """Return an object as vm-exec sends it."""
    return {
        "lang": "sh", "sourcefile": "prog.sh", "execfile": "prog.sh", "cmdline": "sh prog.sh", "input": None,
        "date": 1700000000, "arguments": "", "code": "echo hi",
    } | changes  # fmt: skip


def frame_today(value: dict[str, object]) -> bytes:
    """Frame as today's vm-exec does: pieces of 4000 bytes, each with a line feed, and an empty line."""
    data = json.dumps(value, ensure_ascii=False).encode()
    return b"".join(data[start : start + 4000] + b"\n" for start in range(0, len(data), 4000)) + b"\n"


def frame_seed(value: dict[str, object]) -> bytes:
    """Frame as the vm-exec of the seed's era does."""
    return json.dumps(value, ensure_ascii=False).encode() + b"\n:end:\n"


def sized(size: int, **changes: object) -> dict[str, object]:
    """Return a request whose object has exactly `size` bytes, and whose program prints how many it has of its own."""
    bare = request(code="wc -c <prog.sh; exit; ", **changes)
    missing = size - len(json.dumps(bare, ensure_ascii=False).encode())
    value = bare | {"code": f"{bare['code']}{'x' * missing}"}
    assert len(json.dumps(value, ensure_ascii=False).encode()) == size
    return value


class GuestServer:
    """PBot's guest-server, as its protocol has it, behind a real tty in line mode with echo and CR LF.

    One TCP peer at a time, as QEMU's character device; what the guest prints while nobody is there is lost.
    """

    def __init__(self, *, seed: bool = False) -> None:
        self.seed = seed
        self.requests: list[dict[str, Any]] = []
        self.blocks: list[bytes] = []
        self.reply: Callable[[dict[str, Any], str], bytes] = lambda _request, text: frame_result(text)
        self.gate = threading.Event()  # a program does not end before it is set
        self.gate.set()
        self._master, self._slave = pty.openpty()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._peer: socket.socket | None = None
        self._ended = False
        self._top = Path(tempfile.mkdtemp(prefix="pbotvm-guest-", dir="/tmp"))
        for work in (self._accept, self._print, self._serve):
            threading.Thread(target=work, daemon=True).start()

    def end(self) -> None:
        self._ended = True
        self.gate.set()
        self._listener.close()
        if self._peer:
            self._peer.close()
        os.write(self._master, b"\x04")  # end of file for who reads the line
        shutil.rmtree(self._top, ignore_errors=True)

    def _accept(self) -> None:
        while not self._ended:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self._peer = peer
            with contextlib.suppress(OSError):
                while data := peer.recv(4096):
                    os.write(self._master, data)
            self._peer = None
            peer.close()

    def _print(self) -> None:
        while not self._ended:
            try:
                data = os.read(self._master, 4096)
            except OSError:
                return
            peer = self._peer
            if peer:
                with contextlib.suppress(OSError):
                    peer.sendall(data)

    def _serve(self) -> None:
        """Read as the guest does: up to 4096 bytes at a time, until the end of a request."""
        end = b"\n:end:\n" if self.seed else b"\n\n"
        buffer = b""
        while not self._ended:
            data = os.read(self._slave, 4096)
            buffer += data
            while end in buffer:
                block, buffer = buffer.split(end, 1)
                self.blocks.append(block)
                os.write(self._slave, self._carry_out(block))

    def _carry_out(self, block: bytes) -> bytes:
        try:
            request = json.loads(block.replace(b"\n", b""))
        except ValueError as exc:
            return frame_result(f"Failed to decode JSON: {exc}\n")
        self.requests.append(request)
        (self._top / request["sourcefile"]).write_text(request["code"] + "\n")
        done = subprocess.run(
            ["bash", "-c", request["cmdline"]],
            cwd=self._top, capture_output=True, text=True, timeout=SECONDS, check=False,
            input=request["input"] or "",
        )  # fmt: skip
        self.gate.wait(SECONDS)
        note = f" [Exit {done.returncode}]" if done.returncode else ""
        return self.reply(request, f"{done.stdout}{note}\n" if note else done.stdout)


def frame_result(text: str) -> bytes:
    """Frame an answer as the guest prints it."""
    return b"result:" + json.dumps({"result": text}, ensure_ascii=False).encode() + b"\nresult:end\n"


class HealthPort:
    """The health port of PBot's guest of either era: asks and answers, or beats."""

    def __init__(self, script: bytes = b"vmstat says\r\n\r\n:END\r\n", *, beats: float | None = None) -> None:
        self.script = script
        self.beats = beats
        self.heard: list[bytes] = []
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> HealthPort:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._server
        self._server.close()

    @property
    def port(self) -> int:
        assert self._server
        return int(self._server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            if self.beats is None:
                while line := await reader.readline():
                    self.heard.append(line)
                    writer.write(line.replace(b"\n", b"\r\n") + self.script)
            else:
                while not writer.is_closing():
                    writer.write(b"\r\n")
                    await asyncio.sleep(self.beats)
        writer.close()
