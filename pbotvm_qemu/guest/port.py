"""The agent's end of a channel: frames in, frames out, and a brake when the host reads slowly."""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING

from . import wire
from .loop import READ, WRITE

if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop

_FULL = 256 * 1024  # bytes waiting above which nobody should add data
_PAGE = 4096
_READS = 16  # in a row
_ABSENT = 0.1  # seconds between looks whether the host came back


class Port:
    """One open descriptor that carries frames.

    `on_frame` gets every frame; `on_room` is called when data may be added again; `on_lost` when the stream cannot be
    used any more: the host went away, or framing was lost. After that, the port looks again whether a host is there; one
    with `on_end` is given up instead, and that is called with what was no frame: it may close the descriptor, or use it otherwise.
    """

    def __init__(
        self,
        loop: Loop,
        fd: int,
        *,
        on_frame: Callable[[wire.Frame], None],
        on_room: Callable[[], None],
        on_lost: Callable[[str], None],
        on_end: Callable[[bytes], None] | None = None,
    ) -> None:
        self._loop = loop
        self._fd = fd
        self._on_frame = on_frame
        self._on_room = on_room
        self._on_lost = on_lost
        self._on_end = on_end
        self._ended = False
        self._decoder = wire.Decoder()
        self._urgent: deque[bytes] = deque()
        self._queue: deque[bytes] = deque()
        self._partial: memoryview | None = None
        self._waiting = 0
        self._was_full = False
        self._absent = False
        os.set_blocking(fd, False)
        self._watched = 0
        self._watch(READ)

    @property
    def full(self) -> bool:
        """Whether the host reads too slowly to take more data now."""
        if self._waiting >= _FULL:
            self._was_full = True
            return True
        return False

    def send(self, frame: bytes, *, urgent: bool = False) -> None:
        """Queue one encoded frame; an urgent one overtakes data that is not yet under way."""
        if self._ended:
            return
        (self._urgent if urgent else self._queue).append(frame)
        self._waiting += len(frame)
        self._flush()

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if events & READ and not self._ended:
            self._receive()

    def _receive(self) -> None:
        pieces: list[bytes] = []
        problem = ""
        for _ in range(_READS):  # a virtio-serial port gives at most a page at a time
            try:
                data = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                break
            except OSError as exc:
                problem = f"read: {exc.strerror}"
                break
            if not data:
                problem = "the host closed the channel"
                break
            pieces.append(data)
            if len(data) < _PAGE:
                break
        if pieces:
            self._absent = False
            self.feed(b"".join(pieces))
        if problem and not self._ended:
            self._lost(problem)

    def feed(self, data: bytes) -> None:
        """Take bytes that the host has sent."""
        try:
            frames = self._decoder.feed(data)
        except wire.WireError as exc:
            self._lost(str(exc))
            return
        for frame in frames:
            if not self._ended:
                self._on_frame(frame)

    def _flush(self) -> None:
        while True:
            if self._partial is None:
                if self._urgent:
                    self._partial = memoryview(self._urgent.popleft())
                elif self._queue:
                    self._partial = memoryview(self._queue.popleft())
                else:
                    break
            try:
                written = os.write(self._fd, self._partial)
            except BlockingIOError:
                break
            except OSError as exc:
                self._lost(f"write: {exc.strerror}")
                return
            self._waiting -= written
            self._partial = self._partial[written:] if written < len(self._partial) else None
        self._watch(READ | (WRITE if self._partial is not None else 0))
        if self._was_full and self._waiting < _FULL // 2:
            self._was_full = False
            self._on_room()

    def _watch(self, events: int) -> None:
        if events != self._watched:
            self._watched = events
            self._loop.watch(self._fd, events, self._ready)

    def _lost(self, why: str) -> None:
        """Forget everything under way, and look again for a host a little later.

        A port without a host reports "hung up" for ever, so it is not watched meanwhile.
        """
        rest, self._decoder = self._decoder.rest, wire.Decoder()
        self._urgent.clear()
        self._queue.clear()
        self._partial = None
        self._waiting = 0
        if self._ended:
            return
        self._watch(0)
        if self._on_end:
            self._ended = True
            self._on_lost(why)
            self._on_end(rest)
            return
        self._loop.after(_ABSENT, lambda: self._watch(READ))
        if not self._absent:  # said once, not ten times a second
            self._absent = True
            self._on_lost(why)
