"""The native protocol: frames over any byte stream. Both the host and the guest import this file.

A frame is a header of 10 bytes and a payload of at most 64 KiB:

```text
byte 0      0xF5, which no UTF-8 text contains: tells a native peer from a PBot one, and finds lost framing at once
byte 1      type, see FrameType
bytes 2-5   id of the run or question, big endian; 0 for the channel itself
bytes 6-9   length of the payload, big endian
```

Payloads are JSON objects for control and raw bytes for data. `docs/protocol.md` has the conversation.
"""

from __future__ import annotations

import json
import struct
from enum import IntEnum
from typing import NamedTuple

MAGIC = 0xF5
VERSION = 1
HEADER = struct.Struct("!BBII")
PAYLOAD_MAX = 64 * 1024
CHUNK = 32 * 1024 - HEADER.size  # bytes of data per frame: with its header, what Linux takes in one write to a port

# Bytes that may be under way without a `credit` frame, per run and direction.
STDIN_WINDOW = 256 * 1024
OUTPUT_WINDOW = 1024 * 1024
CREDIT = 64 * 1024  # bytes that a receiver has taken when it sends credit: a frame for each piece would cost more

# What a frame counts beside its payload: one-byte writes must not make a million frames out of a window.
FRAME_COST = 64

FILES_MAX = 64
FILES_BYTES_MAX = 256 << 20  # sources and files of one run together
RUNS_MAX = 64  # at once in one guest
ARGV_MAX = 4096


class FrameType(IntEnum):
    """What a frame means. Direction: > from host to guest, < from guest to host."""

    HELLO = 1  # > {"nonce"} and < {"nonce", "protocol", "agent", ...}
    RESUME = 2  # > {"clock_ns", "entropy", "hostname", "network"} and < {} when it is done
    PING = 3  # > any bytes, < the same bytes
    RUN = 4  # > {"files", "steps", "limits", ...}, see docs/protocol.md
    DATA = 5  # > content of the files of `run`, in order; < content of a `file`
    STDIN = 6  # > bytes; an empty payload is the end of input
    STDOUT = 7  # <
    STDERR = 8  # <
    CREDIT = 9  # both: 4 bytes, that many more may be sent
    SIGNAL = 10  # > {"signal": number}
    CANCEL = 11  # > {}: kill it; `exit` still follows
    FILE = 12  # < {"name", "size"} or {"name", "error"}: a file asked for with "collect"
    EXIT = 13  # < how it ended; the last frame of a run
    ERROR = 14  # both: {"code", "message"}; for a run it means that it never ran
    CONTROL = 15  # > and <: questions to a keeper on its control socket; an agent refuses it


class WireError(Exception):
    """The peer does not speak this protocol. The channel is unusable."""


class Frame(NamedTuple):
    """One frame. `type` is a plain number, because a peer may send one that we do not know."""

    type: int
    id: int
    payload: bytes


def encode(type_: int, id_: int, payload: bytes | bytearray | memoryview = b"") -> bytes:
    """Return the bytes of one frame.

    Raises WireError when the payload is over PAYLOAD_MAX.
    """
    if len(payload) > PAYLOAD_MAX:
        raise WireError(f"a payload of {len(payload)} bytes is over the limit of {PAYLOAD_MAX}")
    return HEADER.pack(MAGIC, type_, id_, len(payload)) + payload


def encode_json(type_: int, id_: int, value: dict[str, object]) -> bytes:
    """Return the bytes of one control frame."""
    return encode(type_, id_, json.dumps(value, separators=(",", ":")).encode())


def encode_credit(id_: int, count: int) -> bytes:
    """Return the bytes of a frame that lets the peer send `count` bytes more."""
    return encode(FrameType.CREDIT, id_, struct.pack("!I", count))


def cost(payload: bytes) -> int:
    """Return how much of the output window a frame with `payload` takes. Both ends count alike."""
    return len(payload) + FRAME_COST


def credit(frame: Frame) -> int:
    """Return how many bytes more a credit frame allows.

    Raises WireError when it is not 4 bytes.
    """
    if len(frame.payload) != 4:
        raise WireError("a credit frame must hold 4 bytes")
    return int(struct.unpack("!I", frame.payload)[0])


def decode_json(payload: bytes) -> dict[str, object]:
    """Return the object in a control payload.

    Raises WireError for anything that is not one JSON object; nesting without end is caught too.
    """
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as exc:
        raise WireError(f"a control frame does not hold JSON: {type(exc).__name__}") from None
    if not isinstance(value, dict):
        raise WireError("a control frame must hold a JSON object")
    return value


class Decoder:
    """Cuts a byte stream into frames. Holds at most one frame that is not complete."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._nonce: bytes | None = None

    def expect_hello(self, nonce: str) -> None:
        """Throw away everything up to the `hello` answer that begins with `nonce`.

        Used after a start or a restore, when the stream may hold the rest of an older conversation.
        """
        self._nonce = b'{"nonce":"' + nonce.encode("ascii") + b'"'

    @property
    def idle(self) -> bool:
        """Whether no part of a frame is waiting."""
        return not self._buffer

    @property
    def rest(self) -> bytes:
        """The bytes that belong to no frame yet; after a WireError, those where framing was lost."""
        return bytes(self._buffer)

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that `data` completes.

        Raises WireError on a wrong first byte or an oversized payload, before that payload is read.
        """
        buffer = self._buffer
        buffer += data
        if self._nonce is not None and not self._resynchronise(self._nonce):
            return []
        frames = []
        start = 0
        end = len(buffer)
        while end - start >= HEADER.size:
            magic, type_, id_, length = HEADER.unpack_from(buffer, start)
            if magic != MAGIC or length > PAYLOAD_MAX:
                del buffer[:start]
            if magic != MAGIC:
                raise WireError(f"framing lost: byte 0x{magic:02x} where a frame should begin")
            if length > PAYLOAD_MAX:
                raise WireError(f"a frame announces {length} bytes, the limit is {PAYLOAD_MAX}")
            stop = start + HEADER.size + length
            if stop > end:
                break
            frames.append(Frame(type_, id_, bytes(buffer[start + HEADER.size : stop])))
            start = stop
        del buffer[:start]
        return frames

    def _resynchronise(self, nonce: bytes) -> bool:
        found = self._buffer.find(nonce, HEADER.size)
        keep = HEADER.size + len(nonce)
        if found < 0:
            del self._buffer[: max(0, len(self._buffer) - keep)]
            return False
        del self._buffer[: found - HEADER.size]
        self._nonce = None
        return True
