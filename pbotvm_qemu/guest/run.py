"""One run: its directory, its processes, its streams, its end."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import signal
import stat
import termios
import time
from array import array
from collections import deque
from enum import Enum, auto
from typing import TYPE_CHECKING

from . import child, system, wire
from .loop import READ, WRITE
from .spec import REPORT_SECONDS
from .wire import FrameType

if TYPE_CHECKING:
    from collections.abc import Callable

    from .child import Owner
    from .loop import Loop, Timer
    from .port import Port
    from .spec import RunSpec


_LOOK = 0.25  # seconds between two looks at a run's memory
_STARVED = 4  # looks in a row without memory that end it
_FAST = 0.002  # seconds between two pieces of output that make a stream a fast one
_PAUSE = 0.001  # seconds for which a fast stream is left alone
_PIPE = 256 << 10  # bytes that a stream's pipe holds, where the kernel allows it
_BURST = 8  # frames of one stream in a row
_DRAIN = 2.0  # seconds for output to end after every process was killed
_DRAIN_KEPT = 0.2  # seconds without output after which a kept run's streams are closed: what it left may hold them
_CORE = "core"  # what start sets core_pattern to


def _waiting(fd: int) -> bool:
    """Tell whether bytes can be read from pipe `fd`."""
    count = array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return bool(count[0])


def _enlarge(fd: int) -> None:
    """Let pipe `fd` hold much; without room for that it stays as it is."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE)


class _Stage(Enum):
    RECEIVING = auto()  # files of the request
    RUNNING = auto()
    DRAINING = auto()  # killed; the pipes may hold output
    COLLECTING = auto()  # sending files that were asked for
    DONE = auto()


class Run:
    """Follows one `run` frame to its `exit` frame. Call `close` to forget it without an answer."""

    def __init__(
        self,
        loop: Loop,
        port: Port,
        id_: int,
        spec: RunSpec,
        owner: Owner,
        on_done: Callable[[int], None],
        *,
        folder: str = "",
    ) -> None:
        self._loop = loop
        self._port = port
        self._id = id_
        self._spec = spec
        self._owner = owner
        self._on_done = on_done
        self._stage = _Stage.RECEIVING
        self._keep = spec.keep
        self._directory = f"{owner.home}/{'session' if self._keep else folder or id_}"
        self._pending_files = deque(spec.files)
        self._file = -1
        self._file_left = 0
        self._cgroup: system.Cgroup | None = None
        self._pid = 0
        self._pidfd = -1
        self._exec_error = -1
        self._step = 0
        self._stdin = -1
        self._stdin_queue: deque[bytes] = deque()
        self._stdin_end = False
        self._stdin_room = wire.STDIN_WINDOW
        self._stdin_taken = 0  # bytes for which the host has no credit yet
        self._outputs: dict[int, FrameType] = {}
        self._paused = False
        self._late = -1  # the stream that is left alone for a moment
        self._heard = 0.0  # when output came last
        self._room = wire.OUTPUT_WINDOW
        self._sent = 0
        self._sending: deque[tuple[str, int, int]] = deque()
        self._status: int | None = None
        self._signal: int | None = None
        self._limit: str | None = None
        self._cancelled = False
        self._truncated = False
        self._message = ""
        self._started = time.monotonic()
        self._build_s = 0.0
        self._ended = 0.0
        self._before = 0  # bytes sent before the step began
        self._reporting = False  # the program has ended, the debugger looks at what it left
        self._timer: Timer | None = None
        if not self._keep:
            system.remove_tree(self._directory)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._directory, 0o700)
            self._give(self._directory)
        if owner.cgroups:
            memory = spec.limits.memory or max(system.memory_total() - system.RESERVE, 16 << 20)
            # Numbers of runs begin anew with each host, groups of an earlier one may still be there.
            self._cgroup = system.Cgroup(
                f"run-{id_}-{time.monotonic_ns()}", memory=memory, processes=spec.limits.processes
            )
        self._next_file()

    @property
    def done(self) -> bool:
        """Whether its last frame is sent."""
        return self._stage is _Stage.DONE

    @property
    def building(self) -> bool:
        """Whether what is sent now belongs to a step before the program itself."""
        return self._step < len(self._spec.steps) - 1

    # Frames from the host -------------------------------------------------------------------------------------------

    def data(self, payload: bytes) -> None:
        """Take bytes of the files that `run` announced. Raises WireError for more than was announced."""
        if self._stage is _Stage.DONE:
            return
        if self._stage is not _Stage.RECEIVING or len(payload) > self._file_left + sum(
            f.size for f in self._pending_files
        ):
            raise wire.WireError("more file data than the run frame announced")
        view = memoryview(payload)
        while view:
            piece = view[: self._file_left]
            if not self._message:
                try:
                    os.write(self._file, piece)
                except OSError as exc:  # disk full: said in the exit frame, the rest is swallowed
                    self._message = f"cannot store the program: {exc.strerror}"
            self._file_left -= len(piece)
            view = view[len(piece) :]
            if not self._file_left:
                self._next_file()

    def stdin(self, payload: bytes) -> None:
        """Take input; an empty payload ends it. Raises WireError when the host sends more than it may."""
        if not payload:
            self._stdin_end = True
        else:
            self._stdin_room -= len(payload)
            if self._stdin_room < 0:
                raise wire.WireError("more input than the credit allows")
            self._stdin_queue.append(payload)
        self._feed(0)

    def credit(self, count: int) -> None:
        """Let the program print `count` bytes more."""
        self._room = min(self._room + count, wire.OUTPUT_WINDOW)
        self.resume()

    def signal(self, number: int) -> None:
        """Send a signal to the program. One that has ended takes no harm."""
        if self._pid and self._pidfd >= 0 and 0 < number < signal.NSIG:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, number)

    def cancel(self) -> None:
        """Kill it; its `exit` frame follows."""
        if self._stage in (_Stage.RECEIVING, _Stage.RUNNING):
            self._cancelled = True
            self._finish()

    def resume(self) -> None:
        """Go on sending after the port or the host's credit had run out."""
        if self._paused and not self._port.full and self._room > 0:
            self._paused = False
            for fd in self._outputs:
                self._listen(fd)
            if self._late >= 0:
                self._output(self._late)
        if self._stage is _Stage.COLLECTING:
            self._send_files()

    def close(self) -> None:
        """End without an answer: nobody listens any more."""
        if self._stage is not _Stage.DONE:
            self._kill()
            self._clean_up()

    # Files -------------------------------------------------------------------------------------------------------------

    def _give(self, path: str | int) -> None:
        if self._owner.uid is not None and self._owner.gid is not None:
            os.chown(path, self._owner.uid, self._owner.gid)

    def _next_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        while self._pending_files:
            file = self._pending_files.popleft()
            path = f"{self._directory}/{file.name}"
            if self._keep:  # of an earlier run
                system.remove(path)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            self._give(path)
            self._file_left = file.size
            if self._file_left:
                return
            os.close(self._file)
            self._file = -1
        self._begin()

    def _begin(self) -> None:
        self._stage = _Stage.RUNNING
        self._started = time.monotonic()
        if self._message:
            self._finish()
            return
        if self._keep and self._spec.report:  # of an earlier run
            system.remove(f"{self._directory}/{_CORE}")
        limits = self._spec.limits
        built = len(self._spec.steps) > 1 and limits.build > 0
        self._timer = self._loop.after(limits.build if built else limits.wall, lambda: self._reach("wall"))
        self._loop.after(_LOOK, self._watch_memory)
        self._next_step()

    # Processes ---------------------------------------------------------------------------------------------------------

    def _next_step(self) -> None:
        self._start(self._spec.steps[self._step], last=self._step == len(self._spec.steps) - 1)

    def _start(self, argv: tuple[str, ...], *, last: bool) -> None:
        try:
            self._spawn(argv, last=last)
        except OSError as exc:  # no process or descriptor is left for it
            self._message = f"cannot be started: {exc.strerror}"
            self._finish()

    def _spawn(self, argv: tuple[str, ...], *, last: bool) -> None:
        self._before = self._sent
        own = child.own_step(argv)  # imported before the fork, so that the snapshot has it
        stdout, stdout_child = os.pipe()
        stderr, stderr_child = os.pipe()
        error, error_child = os.pipe()
        if last and self._spec.stdin and not self._reporting:
            stdin_child, self._stdin = os.pipe()
            os.set_blocking(self._stdin, False)
            _enlarge(self._stdin)
        else:
            stdin_child = os.open("/dev/null", os.O_RDONLY)
        for fd in (stdout_child, stderr_child, *([stdin_child] if self._stdin >= 0 else [])):
            self._give(fd)  # so that the program can open /dev/stdin, /dev/stdout and /dev/stderr
        limits = self._spec.limits
        here = child.Surroundings(
            directory=self._directory,
            variables=self._spec.env,
            owner=self._owner,
            cgroup=self._cgroup,
            cpu=math.ceil(limits.build if self._building and limits.build else limits.cpu or limits.wall),
            file_size=limits.file_size,
        )
        pid = os.fork()
        if not pid:
            child.become(argv, own, here, (stdin_child, stdout_child, stderr_child), error_child)
        for fd in (stdin_child, stdout_child, stderr_child, error_child):
            os.close(fd)
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._exec_error = error
        self._loop.watch(self._pidfd, READ, lambda _events: self._reap())
        for fd, type_ in ((stdout, FrameType.STDOUT), (stderr, FrameType.STDERR)):
            os.set_blocking(fd, False)
            _enlarge(fd)
            self._outputs[fd] = type_ if last else FrameType.STDERR  # a compiler's words are no program output
        self._paused = True
        self.resume()
        self._feed(0)

    def _reap(self) -> None:
        _pid, status = os.waitpid(self._pid, 0)
        self._loop.watch(self._pidfd, 0, lambda _events: None)
        os.close(self._pidfd)
        self._pidfd = -1
        error = os.read(self._exec_error, 512)
        os.close(self._exec_error)
        self._exec_error = -1
        if self._stage is not _Stage.RUNNING:
            return
        if self._reporting:
            self._finish()
            return
        if error:
            self._message = f"cannot be started: {error.decode('utf-8', 'replace')}"
        elif os.WIFSIGNALED(status):
            self._signal = os.WTERMSIG(status)
        else:
            self._status = os.WEXITSTATUS(status)
        if self._wants_report():
            self._report()
        else:
            self._finish()

    def _wants_report(self) -> bool:
        """Tell whether the program left something to look at, and crashed or said nothing."""
        if self._building or not self._spec.report or not os.path.isfile(f"{self._directory}/{_CORE}"):
            return False
        return self._signal is not None or (self._sent == self._before and not any(map(_waiting, self._outputs)))

    def _report(self) -> None:
        """Have the debugger say what it finds; the program has ended, and its time too."""
        self._reporting = True
        self._ended = time.monotonic()
        self._close_stdin()
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.after(REPORT_SECONDS, self._finish)
        self._start(self._spec.report, last=True)

    def _watch_memory(self, times: int = 0) -> None:
        """End a run that has had no memory left at several looks in a row."""
        if self._stage is not _Stage.RUNNING or not self._cgroup:
            return
        times = times + 1 if self._cgroup.exhausted() else 0
        if times >= _STARVED:
            self._reach("memory")
        else:
            self._loop.after(_LOOK, lambda: self._watch_memory(times))

    def _reach(self, limit: str) -> None:
        """End the run because it reached a limit."""
        if self._stage is _Stage.RUNNING:
            self._limit = None if self._reporting else limit
            self._finish()

    def _kill(self) -> None:
        if self._pidfd >= 0:  # it may not have got as far as its group
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        if self._cgroup:
            with contextlib.suppress(OSError):
                self._cgroup.kill()
        elif self._pid:
            with contextlib.suppress(OSError):
                os.killpg(self._pid, signal.SIGKILL)

    def _finish(self) -> None:
        """Kill what is left of a program that ended or must end, and send what it still had to say."""
        self._stage = _Stage.DRAINING
        if not self._reporting:
            self._ended = time.monotonic()
        if self._timer:
            self._timer.cancel()
        # Of a session, what a program leaves running stays; a debugger that took too long does not.
        if not self._keep or self._limit or self._cancelled or self._pidfd >= 0:
            self._kill()
        self._close_stdin()
        self._wait_for_output()
        if self._late >= 0 and not self._paused:
            self._listen(self._late)
        if not self._outputs:
            self._drained()

    def _wait_for_output(self) -> None:
        """Give the streams their time to end."""
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.after(_DRAIN_KEPT if self._keep else _DRAIN, self._silent)

    def _silent(self) -> None:
        """No output came for a while."""
        if self._paused:  # because the host does not take it, which has deadlines of its own
            self._wait_for_output()
        else:
            self._drained()

    # Streams -----------------------------------------------------------------------------------------------------------

    def _listen(self, fd: int) -> None:
        self._loop.watch(fd, READ, lambda _events: self._output(fd))

    def _output(self, fd: int) -> None:
        """Send on what one stream of the program holds, or note its end.

        A program that prints much wakes us for each of its writes, which is most of the work. So a stream on which data
        come fast is left alone for a moment, and then holds much at once. When the other stream has something meanwhile,
        the first one is read empty before it: what it holds was written earlier.
        """
        late, self._late = self._late, -1
        if late not in (-1, fd):
            self._listen(late)
            while self._forward(late):
                pass
            if self._paused:
                self._late = late
                return
        if fd not in self._outputs:
            return
        for _ in range(_BURST):
            if not self._forward(fd):
                break
        if self._stage is not _Stage.RUNNING or self._paused or fd not in self._outputs:
            return
        now = time.monotonic()
        if now - self._heard < _FAST:
            self._leave(fd)
        self._heard = now

    def _leave(self, fd: int) -> None:
        """Let a stream fill for a moment."""
        self._late = fd
        self._loop.watch(fd, 0, lambda _events: None)
        self._loop.after(_PAUSE, lambda: self._return(fd))

    def _return(self, fd: int) -> None:
        """Look after a stream that was left alone, unless that has happened already."""
        if self._late == fd and not self._paused:
            self._listen(fd)
            self._output(fd)

    def _forward(self, fd: int) -> bool:
        """Send one frame of what stream `fd` holds; tell whether it may hold more that can be sent now."""
        if self._port.full or self._room <= 0:
            self._paused = True
            for other in self._outputs:
                self._loop.watch(other, 0, lambda _events: None)
            return False
        try:
            data = os.read(fd, wire.CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._close_output(fd)
            if not self._outputs and self._stage is _Stage.DRAINING:
                self._drained()
            return False
        full = len(data) == wire.CHUNK
        left = self._spec.limits.output - self._sent
        if len(data) > left:
            self._truncated = True
            data = data[:left]
            self._reach("output")
        if data:
            self._sent += len(data)
            self._room -= wire.cost(data)
            if self._stage is _Stage.DRAINING:  # the host is reading: it gets its time anew
                self._wait_for_output()
            self._port.send(wire.encode(self._outputs[fd], self._id, data))
        return full and fd in self._outputs

    def _close_output(self, fd: int) -> None:
        self._loop.watch(fd, 0, lambda _events: None)
        os.close(fd)
        del self._outputs[fd]
        if self._late == fd:
            self._late = -1

    def _feed(self, _events: int) -> None:
        """Write input to the program as far as its pipe takes it, and give the host credit for it."""
        done = 0
        if self._stdin < 0 and self._stage is not _Stage.RECEIVING and not self._building:
            done = sum(len(piece) for piece in self._stdin_queue)  # it does not read (any more): swallow
            self._stdin_queue.clear()
        while self._stdin >= 0 and self._stdin_queue:
            piece = self._stdin_queue.popleft()
            try:
                written = os.write(self._stdin, piece)
            except BlockingIOError:
                self._stdin_queue.appendleft(piece)
                break
            except OSError:  # EPIPE: the program closed its input
                done += len(piece)
                self._close_stdin()
                break
            done += written
            if written < len(piece):
                self._stdin_queue.appendleft(piece[written:])
        if self._stdin >= 0:
            if not self._stdin_queue and self._stdin_end:
                self._close_stdin()
            else:
                self._loop.watch(self._stdin, WRITE if self._stdin_queue else 0, self._feed)
        self._stdin_taken += done
        # Not for each piece: a frame costs more than its bytes.
        if self._stage is _Stage.DONE or self._stdin_taken < wire.CREDIT:
            return
        self._stdin_room += self._stdin_taken
        self._port.send(wire.encode_credit(self._id, self._stdin_taken), urgent=True)
        self._stdin_taken = 0

    @property
    def _building(self) -> bool:
        return self._stage is _Stage.RUNNING and self._step < len(self._spec.steps) - 1

    def _close_stdin(self) -> None:
        if self._stdin >= 0:
            self._loop.watch(self._stdin, 0, lambda _events: None)
            os.close(self._stdin)
            self._stdin = -1

    # The end -----------------------------------------------------------------------------------------------------------

    def _drained(self) -> None:
        """All output is sent (or will not come): next step, or files and the exit frame."""
        if self._stage is not _Stage.DRAINING:
            return
        if self._timer:
            self._timer.cancel()
        for fd in list(self._outputs):
            self._truncated = self._truncated or not self._keep  # held open by something that we could not kill
            self._close_output(fd)
        built = self._status == 0 and not self._limit and not self._cancelled and not self._message
        if built and self._step < len(self._spec.steps) - 1:
            self._step += 1
            self._stage = _Stage.RUNNING
            self._status = None
            now = time.monotonic()
            if self._step == len(self._spec.steps) - 1 and self._spec.limits.build:
                self._build_s = now - self._started
                self._started = now  # the program has its own time
            budget = self._spec.limits.build if self._building and self._spec.limits.build else self._spec.limits.wall
            left = budget - (now - self._started)
            self._timer = self._loop.after(max(0.0, left), lambda: self._reach("wall"))
            self._next_step()
            return
        self._stage = _Stage.COLLECTING
        for name in self._spec.collect:
            self._announce(name)
            if self.done:  # the host went away while we sent
                return
        self._send_files()

    def _announce(self, name: str) -> None:
        """Open a file that the caller wants and queue it; what is no plain file is named as missing."""
        try:
            fd = self._open_as_owner(f"{self._directory}/{name}")
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                os.close(fd)
                raise OSError(0, "not a regular file")
            if found.st_size > wire.FILES_BYTES_MAX:
                os.close(fd)
                raise OSError(0, f"larger than {wire.FILES_BYTES_MAX} bytes")
        except OSError as exc:
            self._port.send(wire.encode_json(FrameType.FILE, self._id, {"name": name, "error": exc.strerror}))
        else:
            self._sending.append((name, fd, found.st_size))

    def _open_as_owner(self, path: str) -> int:
        """Open for reading with the rights of the program, so that it cannot have us read for it."""
        if self._owner.uid is None:
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        os.seteuid(self._owner.uid)
        try:
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        finally:
            os.seteuid(0)

    def _send_files(self) -> None:
        while self._sending:
            name, fd, left = self._sending[0]
            if self._file != fd:
                self._file = fd
                self._port.send(wire.encode_json(FrameType.FILE, self._id, {"name": name, "size": left}))
                if self.done:  # the host went away while we sent
                    return
            while left:
                if self._port.full or self._room <= 0:
                    self._sending[0] = (name, fd, left)
                    return
                # Everything that could change the file is dead; a shorter read is padded, so that framing holds.
                data = os.read(fd, min(left, wire.CHUNK)) or bytes(min(left, wire.CHUNK))
                left -= len(data)
                self._room -= wire.cost(data)
                self._port.send(wire.encode(FrameType.DATA, self._id, data))
                if self.done:
                    return
            os.close(fd)
            self._file = -1
            self._sending.popleft()
        self._answer()

    def _answer(self) -> None:
        cgroup = self._cgroup
        limit = self._limit
        if not limit and cgroup and cgroup.oom_kills():
            limit = "memory"
        if not limit and self._signal in (signal.SIGXCPU, signal.SIGXFSZ):
            limit = "cpu" if self._signal == signal.SIGXCPU else "file_size"
        if not limit and self._status != 0 and cgroup and cgroup.fork_refusals():
            limit = "processes"
        if self._limit or self._cancelled:
            self._status, self._signal = None, int(signal.SIGKILL)
        answer: dict[str, object] = {
            "status": self._status,
            "signal": self._signal,
            "timed_out": limit == "wall",
            "cancelled": self._cancelled,
            "truncated": self._truncated,
            "limit": limit,
            "stage": "run" if self._step == len(self._spec.steps) - 1 else "build",
            "message": self._message,
            "wall_s": round(self._ended - self._started, 4),
            "build_s": round(self._build_s, 4),
            "cpu_s": round(cgroup.cpu_seconds(), 4) if cgroup else None,
            "memory_peak": cgroup.memory_peak() if cgroup else None,
        }
        port, id_ = self._port, self._id
        port.send(wire.encode_json(FrameType.EXIT, id_, answer))
        self._clean_up()

    def _clean_up(self) -> None:
        self._stage = _Stage.DONE
        if self._timer:
            self._timer.cancel()
        self._close_stdin()
        for fd in list(self._outputs):
            self._close_output(fd)
        for _name, fd, _left in self._sending:
            os.close(fd)
            if self._file == fd:
                self._file = -1
        self._sending.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._remove()
        self._on_done(self._id)

    def _remove(self, tries: int = 100) -> None:
        """Remove group and directory; the kernel needs a moment until killed processes are out of the group."""
        gone = self._cgroup is None or self._cgroup.remove()
        if self._keep:
            if self._cgroup:
                self._cgroup.forget()  # what runs on keeps it
            return
        if (self._pidfd >= 0 or not gone) and tries:
            self._loop.after(0.02, lambda: self._remove(tries - 1))
            return
        system.remove_tree(self._directory)
