"""The only door to subprocesses, and the only importer of psutil.

No shell, standard input from nowhere, bounded output, a deadline on every wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from pbotvm_qemu.errors import CommandError, HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

OUTPUT_MAX = 4 << 20  # bytes kept of each stream of a helper program
TERMINATE = signal.SIGTERM
_GRACE = 5.0  # seconds between SIGTERM and SIGKILL


def find_program(name: str, *, package: str) -> str:
    """Return the absolute path of the program `name`, also looking where root's programs live.

    Raises HostError that names the Debian `package` when there is none.
    """
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin:/sbin:/usr/bin:/bin"
    found = shutil.which(name, path=path)
    if not found:
        raise HostError(f"the program {name} is not installed", hint=f"apt-get install {package}")
    return found


@dataclass(frozen=True, slots=True)
class Completed:
    """A program that ended: its status (negative for a signal) and the end of what it printed."""

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: bytes

    def check(self, *, hint: str | None = None) -> Completed:
        """Return self, or raise CommandError when the status is not 0."""
        if self.status:
            how = f"killed by signal {-self.status}" if self.status < 0 else f"exit status {self.status}"
            raise CommandError(self.argv, how, self.stderr, hint=hint)
        return self


async def run(
    argv: Sequence[str],
    *,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    data: bytes | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Completed:
    """Run `argv` to its end and return what happened; `on_line` sees each line of stderr as it comes.

    `data` is its standard input; without it, it reads from nowhere.

    Raises CommandError when it cannot be started or takes longer than `timeout` seconds; on that, and when the caller
    is cancelled, the program and what it started are gone before this returns.
    """
    try:
        child = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL if data is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=dict(env) if env is not None else None,
            cwd=cwd,
            start_new_session=True,
        )
    except OSError as exc:
        raise CommandError(argv, f"cannot be started: {exc.strerror}", hint=f"check {argv[0]}") from exc
    assert child.stdout
    assert child.stderr
    readers = [
        asyncio.create_task(_read(child.stdout, None)),
        asyncio.create_task(_read(child.stderr, on_line)),
        *([] if data is None else [asyncio.create_task(_feed(child.stdin, data))]),
    ]
    finished = False
    try:
        async with asyncio.timeout(timeout):
            stdout, stderr, *_ = await asyncio.gather(*readers)
            status = await child.wait()
        finished = True
    except TimeoutError as exc:
        raise CommandError(argv, f"not finished after {timeout:.0f} s", hint="try again on a quieter host") from exc
    finally:
        if not finished:
            await _end(child)
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    return Completed(tuple(argv), status, stdout, stderr)


async def _read(stream: asyncio.StreamReader, on_line: Callable[[str], None] | None) -> bytes:
    """Read to the end, keep the last OUTPUT_MAX bytes."""
    kept = bytearray()
    unfinished = b""
    while chunk := await stream.read(1 << 16):
        kept += chunk
        del kept[: max(0, len(kept) - OUTPUT_MAX)]
        if on_line:
            *lines, unfinished = (unfinished + chunk).split(b"\n")
            unfinished = unfinished[-4096:]
            for line in lines:
                on_line(line.decode("utf-8", "replace"))
    if on_line and unfinished:
        on_line(unfinished.decode("utf-8", "replace"))
    return bytes(kept)


async def _feed(stream: asyncio.StreamWriter | None, data: bytes) -> bytes:
    """Write `data` to the child's standard input and end it; a child that does not read it has its reasons."""
    assert stream
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        stream.write(data)
        await stream.drain()
    stream.close()
    return b""


async def _end(child: asyncio.subprocess.Process) -> None:
    """Make sure that the child's whole session is gone: SIGTERM lets it clean up, SIGKILL ends the argument."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(child.wait(), _GRACE)
    with contextlib.suppress(ProcessLookupError):  # also what outlived the first process
        os.killpg(child.pid, signal.SIGKILL)
    await child.wait()


@dataclass(frozen=True, slots=True)
class Identity:
    """A process that cannot be mistaken for a later one with the same pid."""

    pid: int
    started: float  # seconds since the epoch, as the kernel tells it through psutil

    @staticmethod
    def of(pid: int) -> Identity | None:
        """Return the identity of the live process `pid`, or None."""
        try:
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            return Identity(pid, process.create_time())
        except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError):
            return None

    def alive(self) -> bool:
        """Tell whether this very process still runs (a zombie does not)."""
        now = Identity.of(self.pid)
        return now is not None and abs(now.started - self.started) < 0.02

    def kill(self) -> bool:
        """Send SIGKILL when this very process still runs; tell whether it was sent."""
        if not self.alive():
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, signal.SIGKILL)
            return True
        return False


def with_words(*words: str) -> list[Identity]:
    """Return the processes that have `words` in a row in their command line."""
    wanted = list(words)
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if any(line[index : index + len(wanted)] == wanted for index in range(len(line))) and (
            identity := Identity.of(process.pid)
        ):
            found.append(identity)
    return found


def stopped(pid: int) -> bool:
    """Tell whether process `pid` was stopped by a signal."""
    try:
        return str(psutil.Process(pid).status()) == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def command_line(pid: int) -> list[str]:
    """Return the arguments that process `pid` was started with; none when it is gone or not ours to see."""
    try:
        return psutil.Process(pid).cmdline()
    except (psutil.Error, ValueError):
        return []


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process uses now."""

    cpu_s: float
    rss: int  # bytes
    pss: int  # bytes, shared pages counted by share; 0 where the kernel does not tell
    uss: int  # bytes that no other process shares; 0 where the kernel does not tell


def usage(pid: int) -> Usage | None:
    """Return what process `pid` uses, or None when it is gone."""
    try:
        process = psutil.Process(pid)
        times = process.cpu_times()
        rss = process.memory_info().rss
        try:
            full = process.memory_full_info()
            pss, uss = full.pss, full.uss
        except psutil.AccessDenied:
            pss = uss = 0
        return Usage(times.user + times.system, rss, pss, uss)
    except psutil.NoSuchProcess:
        return None


def raise_descriptor_limit(wanted: int) -> None:
    """Let this process have `wanted` open descriptors, or as many as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def children_cpu() -> float:
    """Return the processor seconds of this process and of all its children that have ended."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def cpu_seconds(pid: int) -> float | None:
    """Return the processor time that process `pid` has used, or None when it is gone."""
    try:
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    except psutil.NoSuchProcess:
        return None


def memory_available() -> int:
    """Return the bytes of host memory that new processes can have without swapping."""
    return int(psutil.virtual_memory().available)


def listening_pid(port: int) -> int | None:
    """Return the pid of who listens on TCP `port` of this host, where we may see it."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                return connection.pid
    except psutil.AccessDenied:
        return None
    return None


class Child:
    """A long-lived program that we started and own. Made by `Child.start`."""

    def __init__(self, argv: Sequence[str], child: asyncio.subprocess.Process) -> None:
        self.argv = tuple(argv)
        self._child = child
        self._exited = asyncio.create_task(child.wait())

    @classmethod
    async def start(cls, argv: Sequence[str], *, pass_fds: Sequence[int], log: int) -> Child:
        """Start `argv` in a session of its own; descriptors `pass_fds` keep their numbers, all output goes to `log`.

        Raises CommandError when it cannot be started.
        """
        try:
            child = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=pass_fds,
                start_new_session=True,
            )
        except OSError as exc:
            raise CommandError(argv, f"cannot be started: {exc.strerror}", hint=f"check {argv[0]}") from exc
        return cls(argv, child)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    @property
    def status(self) -> int | None:
        """Its exit status (negative for a signal), or None while it runs."""
        return self._child.returncode

    async def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for its end; tell whether it came."""
        done, _ = await asyncio.wait({self._exited}, timeout=timeout)
        return bool(done)

    @property
    def exited(self) -> asyncio.Task[int]:
        """Done when the program has ended. Do not cancel it."""
        return self._exited

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens when it has ended."""
        if self.status is None:
            # Not by its own method, which reaps a program that has just ended, so that asyncio never learns its status.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def kill(self) -> None:
        """Kill it, and wait until the kernel has taken it away."""
        self.send(signal.SIGKILL)
        await self.wait(_GRACE)


class Detached:
    """A program that goes on when we have ended: a keeper in the background, a DHCP server, a rollback on a timer.

    No child of asyncio's, which kills what it started when its event loop goes: Python 3.11 forgot to, 3.13 does not.
    """

    def __init__(self, argv: Sequence[str], *, log: int) -> None:
        """Start `argv` in a session of its own; all output goes to the open file `log`. Raises CommandError."""
        self._status: int | None = None
        null = os.open(os.devnull, os.O_RDONLY)
        streams = [(os.POSIX_SPAWN_DUP2, fd, standard) for fd, standard in ((null, 0), (log, 1), (log, 2))]
        try:
            self.pid = os.posix_spawnp(
                argv[0], list(argv), os.environ, file_actions=streams, setsid=True,
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores
            )  # fmt: skip
        except OSError as exc:
            raise CommandError(argv, f"cannot be started: {exc.strerror}", hint=f"check {argv[0]}") from exc
        finally:
            os.close(null)

    @property
    def status(self) -> int | None:
        """Its exit status (negative for a signal), or None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    async def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for its end; tell whether it came."""
        until = time.monotonic() + timeout
        while self.status is None and time.monotonic() < until:
            await asyncio.sleep(0.02)
        return self.status is not None

    async def end(self, number: signal.Signals, within: float = _GRACE) -> None:
        """Send it a signal, and wait up to `within` seconds for its end."""
        if self.status is None:
            os.kill(self.pid, number)
            await self.wait(within)
