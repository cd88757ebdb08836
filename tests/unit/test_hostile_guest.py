"""A guest that floods the host in every way that the protocol has words for: the channel ends, memory stays small."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu.channel import Channel
from pbotvm_qemu.errors import PbotVMError
from pbotvm_qemu.guest import spec, wire
from pbotvm_qemu.guest.wire import FrameType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

RUN = spec.RunSpec((), (("true",),), {}, False, spec.Limits(60.0, 60.0, 0, 9, 9, 9), ("a",))
BOUND = 8 << 20  # bytes that the host takes before it ends the conversation; the kernel holds some of them


def files(size: int) -> Iterator[bytes]:
    """Name files without end, `size` bytes a frame."""
    for number in itertools.count():
        yield wire.encode_json(FrameType.FILE, 1, {"name": f"{number}", "error": "x" * size})


FLOODS: dict[str, Callable[[], Iterable[bytes]]] = {
    "small names": lambda: files(1),
    "large names": lambda: files(60_000),
    "files that begin": lambda: (wire.encode_json(FrameType.FILE, 1, {"name": f"{n}"}) for n in itertools.count()),
    "output": lambda: itertools.repeat(wire.encode(FrameType.STDOUT, 1, bytes(32_000))),
    "output of nothing": lambda: itertools.repeat(wire.encode(FrameType.STDOUT, 1)),
    "exits": lambda: itertools.repeat(wire.encode_json(FrameType.EXIT, 1, {"status": "x" * 60_000})),
    "unknown types": lambda: itertools.repeat(wire.encode(200, 1, bytes(60_000))),
}


CASES = [(name, waits) for name in FLOODS for waits in (False, True) if waits or not name.startswith("output")]


@pytest.mark.parametrize(("flood", "waits"), CASES)
async def test_a_flood_ends_the_run(flood: str, *, waits: bool) -> None:
    """Whether the caller takes what comes or, with `waits`, stops after the first byte."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    channel = await Channel.open(ours)

    async def show(_stream: str, _data: bytes) -> None:
        if waits:
            await asyncio.Event().wait()

    run = asyncio.ensure_future(channel.execute(RUN, [], on_output=show))

    async def send() -> None:
        sent = 0
        for number, frame in enumerate(itertools.chain([wire.encode(FrameType.STDOUT, 1, b"x")], FLOODS[flood]())):
            await asyncio.get_running_loop().sock_sendall(theirs, frame)
            sent += len(frame)
            if number % 64 == 0:
                await asyncio.sleep(0)
            if run.done():
                return
            assert sent < BOUND

    try:
        with contextlib.suppress(OSError):  # the host has closed the stream
            await asyncio.wait_for(send(), 60)
        if not waits:
            with pytest.raises(PbotVMError):
                await asyncio.wait_for(run, 60)
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await channel.close()
        theirs.close()
