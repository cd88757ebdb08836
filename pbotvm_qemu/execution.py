"""The ends of `exec` and `client` that touch our own files and streams: what goes in, what comes out, what is said."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pbotvm_qemu import config, paths, request, state
from pbotvm_qemu.errors import HostError, StateError, UsageError
from pbotvm_qemu.guest import wire
from pbotvm_qemu.guest.words import split
from pbotvm_qemu.languages import Registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from pbotvm_qemu.channel import Outcome, Stream
    from pbotvm_qemu.config import Limits

_REPLY_MAX = 64 << 20  # bytes of a relay's answer
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Job:
    """What one call of `exec` asks for."""

    request: request.Request
    code: bytes | None  # the program as bytes, when it came from a file or from standard input
    files: tuple[tuple[str, bytes], ...]
    collect: tuple[tuple[str, Path], ...]  # name in the guest, where to store it
    inherit_stdin: bool

    def stdin(self) -> AsyncIterator[bytes] | None:
        """Return the program's input: text that was given, our own standard input, or None for no input."""
        if self.request.stdin is not None:
            return request.once(self.request.stdin.encode("utf-8", "surrogateescape"))
        if not self.inherit_stdin or sys.stdin is None or sys.stdin.isatty():
            return None
        return read_stream(sys.stdin.fileno())

    def store(self, outcome: Outcome) -> None:
        """Write the fetched files to where they were wanted. Raises HostError when one cannot be written."""
        for name, path in self.collect:
            if name in outcome.files:
                try:
                    path.write_bytes(outcome.files[name])
                except OSError as exc:
                    raise HostError(
                        f"cannot write {path}: {exc.strerror}", hint="choose another PATH in --get NAME:PATH"
                    ) from exc


def prepare(
    words: Sequence[str],
    *,
    lang: str,
    vm: str | None,
    args: str | None,
    stdin: str | None,
    file: str | None,
    put: Sequence[str],
    get: Sequence[str],
) -> Job:
    """Return the job that the options of `exec` describe. Raises UsageError for what cannot be."""
    base = request.Request(
        language=lang,
        machine=vm,
        arguments=split(args or ""),
        stdin=None if stdin is None else request.expand_escapes(stdin),
    )
    code: bytes | None = None
    text = " ".join(words)
    from_stdin = text == "-"
    if file is not None or from_stdin:
        if file is not None and words:
            raise UsageError(
                "the program comes from --file, but words were given too", hint="pass arguments with --args"
            )
        code = _read_program(file)
        wanted = base
    else:
        wanted = request.parse_code(text, base)
    if wanted.paste:
        raise UsageError("-paste is for requests to the relay", hint="redirect the output of exec instead")
    return Job(
        request=replace(wanted, machine=wanted.machine or vm),
        code=code,
        files=tuple(_put(item) for item in put),
        collect=tuple(_get(item) for item in get),
        inherit_stdin=not from_stdin,
    )


def info(wanted: request.Request, machine: str) -> str:
    """Return what `-info` prints. Raises UnknownLanguageError when the machine does not have the language."""
    record = state.ready(wanted.machine or machine)
    return request.info(wanted, Registry.load(paths.user_languages()).find(wanted.language, record.languages))


def _read_program(file: str | None) -> bytes:
    """Return the program in `file`, or on our standard input. Raises UsageError when it is empty or too long."""
    try:
        with open(0 if file is None else file, "rb", closefd=file is not None) as stream:
            data = stream.read(request.CODE_MAX + 1)
    except OSError as exc:
        raise UsageError(f"cannot read the program: {exc.strerror}: {file}", hint="check --file") from exc
    if len(data) > request.CODE_MAX:
        raise UsageError(
            f"the program is longer than {request.CODE_MAX} bytes", hint="pass data through standard input or --put"
        )
    if not data.strip():
        raise UsageError("there is no code to run", hint="the program is empty")
    return data


def _put(item: str) -> tuple[str, bytes]:
    path, colon, name = item.rpartition(":")
    if not colon:
        path, name = item, Path(item).name
    try:
        with Path(path).open("rb") as stream:
            data = stream.read(wire.FILES_BYTES_MAX + 1)
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror}", hint="write --put PATH[:NAME]") from exc
    if len(data) > wire.FILES_BYTES_MAX:
        raise UsageError(f"{path} is over {wire.FILES_BYTES_MAX >> 20} MiB", hint="pass data through standard input")
    return name, data


def _get(item: str) -> tuple[str, Path]:
    name, colon, path = item.partition(":")
    return name, Path(path if colon and path else name)


class Sink:
    """Where output goes: straight to our own streams, or into memory for a report."""

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self.pieces: list[tuple[Stream, bytes]] = []

    async def write(self, stream: Stream, data: bytes) -> None:
        """Take a piece of output. Raises BrokenPipeError when whoever reads ours has gone."""
        if self._keep:
            self.pieces.append((stream, data))
            return
        out = sys.stdout.buffer if stream == "stdout" else sys.stderr.buffer
        out.write(data)
        out.flush()

    def text(self, *streams: Stream) -> bytes:
        """Return what was kept of `streams`, in the order of writing."""
        return b"".join(data for stream, data in self.pieces if stream in streams)


async def read_stream(fd: int) -> AsyncIterator[bytes]:
    """Yield what can be read from `fd`, whatever it is: a file, a pipe, a device.

    A thread reads, because no event loop can wait for a regular file; it is a daemon, so that a read that never
    returns does not keep us alive.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes] = asyncio.Queue(maxsize=4)

    def pump() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants more
            while True:
                try:
                    data = os.read(fd, _CHUNK)
                except OSError:
                    data = b""
                asyncio.run_coroutine_threadsafe(queue.put(data), loop).result()
                if not data:
                    return

    threading.Thread(target=pump, daemon=True, name="stdin").start()
    while data := await queue.get():
        yield data


def report(language: str, outcome: Outcome, sink: Sink) -> dict[str, object]:
    """Return the object that `exec --json` prints."""
    streams = {
        "stdout": sink.text("stdout"),
        "stderr": sink.text("stderr"),
        "output": sink.text("stdout", "stderr"),
    }
    result: dict[str, object] = {"language": language}
    for name, data in streams.items():
        result[name] = data.decode("utf-8", "replace")
        with contextlib.suppress(UnicodeDecodeError):
            data.decode("utf-8")
            continue
        result[f"{name}_base64"] = base64.b64encode(data).decode("ascii")
    return result | {
        "exit_code": outcome.exit_code,
        "signal": outcome.signal,
        "signal_name": signal_name(outcome.signal),
        "timed_out": outcome.timed_out,
        "truncated": outcome.truncated,
        "limit": outcome.limit,
        "stage": outcome.stage,
        "message": outcome.message,
        "wall_s": outcome.wall_s,
        "build_s": outcome.build_s,
        "cpu_s": outcome.cpu_s,
        "memory_peak": outcome.memory_peak,
        "queue_s": outcome.queue_s,
        "revert": outcome.revert,
        "transport": outcome.transport,
        "clone": outcome.clone,
        "missing": outcome.missing,
    }


def signal_name(number: int | None) -> str | None:
    """Return the name of a signal, such as SIGSEGV; None for none, and for one that has none."""
    with contextlib.suppress(ValueError):
        return None if number is None else signal.Signals(number).name
    return None


def remarks(outcome: Outcome, limits: Limits) -> list[str]:
    """Return what a person must be told beside the program's own output."""
    building = outcome.stage == "build"
    told = {
        "wall": "the compiler was ended because its time was over; `languages show` says how much it has"
        if building
        else f"the program was ended after {limits.wall:g} s; --timeout allows more",
        "output": f"the output was cut at {config.format_size(limits.output)}; --output-limit allows more",
        "memory": "the program was ended because it used more memory than there is",
        "cpu": "the program was ended because it used all of its processor time; --timeout allows more",
        "processes": f"a limit of {limits.processes} processes was reached",
        "file_size": f"the program was ended because a file grew over {config.format_size(limits.file_size)}",
    }
    lines = [f"pbotvm-qemu: {told[outcome.limit]}"] if outcome.limit in told else []
    if outcome.truncated and outcome.limit != "output":
        lines.append("pbotvm-qemu: some output was lost")
    if outcome.message:
        lines.append(f"pbotvm-qemu: {outcome.message}")
    lines += [f"pbotvm-qemu: file {name} was not fetched: {why}" for name, why in outcome.missing.items()]
    return lines


def with_token(line: str, token: str) -> str:
    """Return a request for the relay with `token` in it, when there is one."""
    if not token:
        return line
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    return json.dumps(fields | {"token": token}) if isinstance(fields, dict) else f"-token={token} {line}"


async def ask_relay(host: str, port: int, line: str) -> bytes:
    """Send one line to the relay and return all that it answers, as PBot's vm-client does.

    Raises StateError when nobody listens, HostError when the answer does not end.
    """
    try:
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as exc:
        why = os.strerror(exc.errno) if isinstance(exc, OSError) and exc.errno else "no answer in time"
        raise StateError(
            f"Fatal error: {why}; try again later",
            hint=f"start the relay with `pbotvm-qemu run --listen {host}:{port}`",
        ) from exc
    try:
        writer.write(line.replace("\n", " ").encode("utf-8", "surrogateescape") + b"\n")
        await writer.drain()
        reply = bytearray()
        async with asyncio.timeout(600):
            while data := await reader.read(_CHUNK):
                reply += data
                if len(reply) > _REPLY_MAX:
                    raise HostError("the relay's answer does not end", hint="check what listens on that port")
        return bytes(reply)
    except (OSError, TimeoutError) as exc:
        raise HostError(
            f"the relay did not answer: {exc or type(exc).__name__}", hint="see `pbotvm-qemu logs`"
        ) from exc
    finally:
        writer.close()


async def watch_console(name: str, out: BinaryIO) -> None:
    """Copy what machine `name` prints on its serial console to `out` until it ends or we are interrupted.

    Raises StateError when the machine does not run.
    """
    state.load(name)
    path = paths.MachinePaths(name).console_socket
    if not state.running(name):
        raise StateError(f"machine {name!r} is not running", hint=f"start it with `pbotvm-qemu start {name}`")
    if not path.exists():
        raise StateError(
            f"machine {name!r} is kept as clones, which have no console to watch",
            hint=f"stop it, and type `pbotvm-qemu start {name} --revert restart`",
        )
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        while data := await reader.read(_CHUNK):
            # Control characters of a guest have no business on the terminal of the host.
            out.write(bytes(byte if byte in b"\n\r\t" or 32 <= byte < 127 else 63 for byte in data))
            out.flush()
    finally:
        writer.close()
