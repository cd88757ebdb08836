"""VirtualMachine: one QEMU process, its channel, its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import tempfile
import time
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Self, TypeVar

from pbotvm_qemu import net, paths, process, qmp, template, transports, vhost_user
from pbotvm_qemu.config import LOOPBACK
from pbotvm_qemu.errors import GuestError, HostError, LaunchError, MonitorError, PbotVMError, RunLostError, tail
from pbotvm_qemu.plan import (
    DISK,
    Descriptors,
    Memory,
    Plan,
    check_port,
    check_reachable,
    command,
    open_vsock,
    system_user,
)
from pbotvm_qemu.watchdog import LOST, Watchdog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from pbotvm_qemu.channel import Channel, Hello, OnOutput, Outcome
    from pbotvm_qemu.config import WatchdogConfig
    from pbotvm_qemu.guest.spec import RunSpec
    from pbotvm_qemu.template import Frozen

T = TypeVar("T")

log = logging.getLogger(__name__)

_LOG_MAX = 1 << 20  # bytes; a longer log is put aside before the next start

# Seconds. Emulation is about ten times slower than hardware, and hosts are busy.
BOOT_TIMEOUT = {"kvm": 30.0, "tcg": 120.0}
RESTORE_TIMEOUT = {"kvm": 15.0, "tcg": 60.0}
SAVE_TIMEOUT = 180.0
_LOAD_TIMEOUT = 30.0  # the state of a clone is less than a megabyte, a saved memory some hundred
_WAKE_TIMEOUT = 1.0
_LOOK = 1.0  # seconds between two looks at a process that runs a program

# What a kernel says before it gives up: the fault, and where.
_TELLING = re.compile(rb"BUG: |BUG at |Oops: |general protection fault|RIP: 0010:|Kernel panic - ")

# ShutdownCause of QEMU's QAPI: the ends that come from the guest.
_GUEST_ENDS = {
    "guest-reset": "its kernel panicked or restarted",
    "guest-panic": "its kernel panicked",
    "guest-shutdown": "it switched itself off",
}


async def ready_or_dead(ready: Awaitable[T], child: process.Child, within: float) -> T | None:
    """Return what `ready` gives, or None when QEMU ends first.

    Raises TimeoutError when neither happens in `within` seconds.
    """
    task = asyncio.ensure_future(ready)
    try:
        await asyncio.wait({task, child.exited}, timeout=within, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if child.exited.done():
            return None
        raise TimeoutError
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class VirtualMachine:
    """A running guest: a context manager that starts QEMU and leaves nothing of it behind.

    ```python
    async with VirtualMachine(plan) as vm:                      # from its own disk, cold or from a snapshot
        outcome = await vm.execute(spec, content, on_output=show)
    async with VirtualMachine(clone_plan, thaw=frozen) as vm:   # a clone of a frozen machine
        ...
    ```

    `own_memory` is a file that holds a copy of the frozen memory for this clone alone; the machine closes it.
    `hostname` is what the guest is called; two clones with one name are hard to tell apart in logs.
    Starting raises LaunchError with the end of QEMU's log when QEMU ends or its guest stays silent, HostError when a
    port is taken, rights are missing or there is no room for a clone's disk.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        thaw: Frozen | None = None,
        own_memory: IO[bytes] | None = None,
        hostname: str | None = None,
    ) -> None:
        self.plan = plan
        self.name = plan.config.name
        self.hello: Hello | None = None
        self.transport_why = ""  # why a preferred transport is not used; empty when it is
        self.spawned_s = 0.0  # seconds from the start to a QEMU that answers
        self.running_s = 0.0  # seconds from the start to a guest that runs; 0 when it was not thawed
        self.ready_s = 0.0  # seconds from the start to the agent's answer
        self.serial: socket.socket | None = None  # our end of a clone's third serial line
        self._thaw = thaw
        self._own_memory = own_memory
        self._hostname = (hostname or self.name)[:63].replace("_", "-").replace(".", "-")
        self._stack = AsyncExitStack()
        self._child: process.Child | None = None
        self._monitor: qmp.Monitor | None = None
        self._channel: Channel | None = None
        self._port: socket.socket | None = None  # our end of the agent's virtio-serial port
        self._cid = 0
        self._problem = ""
        self._daemon: vhost_user.Daemon | None = None
        self._log: IO[bytes] | None = None
        self._log_start = 0
        self._console_start = 0
        self._disk: IO[bytes] | None = None
        self.attachment = net.Attachment()  # what this machine has of a network

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:  # whatever is raised below, what came before is undone
            await self._start(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """End QEMU. Nothing of it is left when this returns."""
        await self._stack.aclose()

    @property
    def pid(self) -> int:
        """Process id of QEMU."""
        assert self._child
        return self._child.pid

    @property
    def alive(self) -> bool:
        """Whether QEMU runs."""
        return self._child is not None and self._child.status is None

    @property
    def exited(self) -> asyncio.Task[int]:
        """Done when QEMU has ended, however. Do not cancel it."""
        assert self._child
        return self._child.exited

    @property
    def monitor(self) -> qmp.Monitor:
        """The QMP conversation with this QEMU."""
        assert self._monitor
        return self._monitor

    @property
    def channel(self) -> Channel:
        """The conversation with this guest's agent."""
        assert self._channel
        return self._channel

    # Start -----------------------------------------------------------------------------------------------------------

    async def _start(self, stack: AsyncExitStack) -> None:
        started = time.monotonic()
        ours_monitor = await self._spawn(stack)
        stack.push_async_callback(self._hang_up)
        assert self._child
        within = (BOOT_TIMEOUT if self.plan.boot and not self.plan.loadvm else RESTORE_TIMEOUT)[self.plan.accelerator]
        try:
            # A dead QEMU shows as a lost connection and as an ended process; the latter knows why.
            monitor = await ready_or_dead(_entered(stack, qmp.connect(self.name, ours_monitor)), self._child, within)
            self.spawned_s = time.monotonic() - started
            if monitor and self._thaw:
                thawed = await ready_or_dead(self._load(monitor, self._thaw), self._child, _LOAD_TIMEOUT)
                monitor = monitor if thawed else None
                self.running_s = time.monotonic() - started
            if monitor and self.plan.transport == transports.DAEMON:
                await self._plug(stack, monitor)
            hello = await ready_or_dead(self._greet(within), self._child, within + 5) if monitor else None
        except (MonitorError, GuestError, TimeoutError) as exc:
            await self._child.wait(1.0)
            raise await self._launch_error(str(exc) or f"no sign of life within {within:.0f} s") from exc
        if monitor is None or hello is None:
            await self._child.wait(1.0)
            raise await self._launch_error("")
        self._monitor, self.hello = monitor, hello
        stack.push_async_callback(self._quit)  # first on the way out, while the monitor is still connected
        self.ready_s = time.monotonic() - started

    async def _spawn(self, stack: AsyncExitStack) -> socket.socket:
        """Start QEMU; return our end of its monitor."""
        plan = self.plan
        if self._own_memory:
            stack.callback(self._own_memory.close)
        for port in (plan.config.serial, plan.config.health):
            check_port(port)
        with ExitStack() as theirs:  # our copies of QEMU's ends are closed as soon as it has them
            ours_monitor, their_monitor = socket.socketpair()
            ours_agent, their_agent = socket.socketpair()
            stack.callback(ours_monitor.close)
            stack.callback(ours_agent.close)
            self._port = ours_agent
            theirs.enter_context(their_monitor)
            theirs.enter_context(their_agent)
            descriptors = Descriptors(monitor=their_monitor.fileno(), agent=their_agent.fileno())
            if plan.serial_inherited:
                self.serial, their_serial = socket.socketpair()
                stack.callback(self.serial.close)
                theirs.enter_context(their_serial)
                descriptors = replace(descriptors, serial=their_serial.fileno())
            self.attachment = await self._attach(stack)
            descriptors = replace(descriptors, taps=self.attachment.taps, vhosts=self.attachment.vhosts)
            if plan.vsock:
                vsock, self._cid = open_vsock(plan.config.cid)
                theirs.callback(os.close, vsock)
                plan = replace(plan, config=replace(plan.config, cid=self._cid))
                descriptors = replace(descriptors, vsock=vsock)
            if plan.disk is None:
                assert self._thaw
                self._disk = await self._thaw.new_disk(paths.private(paths.MachinePaths(self.name).clones, mode=0o711))
                stack.callback(self._disk.close)
                descriptors = replace(descriptors, overlay=self._disk.fileno())
            if self._own_memory:
                number = self._own_memory.fileno()
                plan = replace(plan, memory=Memory(paths.open_file(number), shared=True))
                descriptors = replace(descriptors, memory=number)
            self._open_log(stack)
            assert self._log
            if plan.console is None:
                console = os.open(f"/proc/self/fd/{self._log.fileno()}", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
                theirs.callback(os.close, console)
                descriptors = replace(descriptors, console=console)
            self._prepare_files()
            self._child = await process.Child.start(
                command(plan, descriptors), pass_fds=descriptors.numbers(), log=self._log.fileno()
            )
        stack.push_async_callback(self._reap)
        self.attachment.hand_over()
        return ours_monitor

    async def _attach(self, stack: AsyncExitStack) -> net.Attachment:
        """Take this machine's place in its network; it is left after QEMU's end."""
        plan = self.plan
        count = net.imagined(plan.config.net, plan.config.cpus)
        place = net.attached(plan.config.net, plan.network, self.name, count=count, vhost=plan.vhost)
        return await stack.enter_async_context(place)

    async def _load(self, monitor: qmp.Monitor, frozen: Frozen) -> bool:
        """Restore a frozen machine into the process that waits for it, and let it run."""
        fd = os.open(frozen.state, os.O_RDONLY | os.O_CLOEXEC)
        try:
            await monitor.load_state(fd, without_memory=frozen.without_memory, timeout=_LOAD_TIMEOUT)
        finally:
            os.close(fd)
        await monitor.execute("cont")
        return True

    async def _plug(self, stack: AsyncExitStack, monitor: qmp.Monitor) -> None:
        """Give the guest the vsock of a daemon, or note why it cannot have one."""
        assert self._log
        problem = self.plan.transport_problem
        if not problem and not (self.plan.memory.shared or self._own_memory):
            problem = (
                "clones map their memory copy on write, where a vhost-user daemon cannot see it: "
                "use --revert restart, or share-memory = false in [pool]"
            )
        if not problem and not self.plan.config.vport:
            problem = "vport is 0"
        try:
            if not problem:
                daemon = await stack.enter_async_context(vhost_user.Daemon(self.name, self._log.fileno()))
                await daemon.plug(monitor)
                self._daemon = daemon
        except (HostError, MonitorError, OSError) as exc:
            problem = str(exc)
        if problem:
            self._problem = f"{transports.DAEMON}: {problem}"
            log.warning("%s; using virtio-serial", self._problem)

    def _transports(self) -> list[transports.Transport]:
        """Return the ways to the agent that may be tried, the preferred first.

        Raises GuestError when this machine does not have the one that was asked for.
        """
        plan = self.plan
        assert self._port
        ways: list[transports.Transport] = []
        cold = plan.boot and not plan.loadvm  # nobody listens there before the guest is up, and its port tells when
        if plan.vsock and plan.config.cid and not cold:
            ways.append(transports.Vsock(self._cid, plan.config.vport))
        ways.append(transports.VirtioSerial(self._port))
        if self._daemon:
            daemon = transports.VhostUserVsock(self._daemon.path, plan.config.vport, found=self._daemon.found)
            ways.insert(0, daemon)
        if plan.transport in (transports.AUTO, transports.DAEMON):
            return ways
        if self.serial:
            ways.append(transports.IsaSerial(self.serial))
        elif plan.config.serial:
            ways.append(transports.IsaSerial((LOOPBACK, plan.config.serial)))
        wanted = [way for way in ways if way.name == plan.transport]
        if not wanted:
            raise GuestError(
                f"machine {self.name!r} has no {plan.transport}", hint="use --transport auto; see `pbotvm-qemu doctor`"
            )
        return wanted

    async def _greet(self, within: float) -> Hello:
        """Open the best way to the agent, and tell the guest who and when it is."""
        reached = await transports.choose(self._transports(), within, problem=self._problem)
        self._channel, self.transport_why = reached.channel, reached.why
        await self.channel.resume(self._hostname, network=self.attachment.resume)
        return reached.hello

    async def _hang_up(self) -> None:
        if self._channel:
            await self._channel.close()

    def _open_log(self, stack: AsyncExitStack) -> None:
        """Have a file for what QEMU prints: the machine's log, or one without a name for a clone."""
        if self.plan.disk is None:
            self._log = tempfile.TemporaryFile(mode="a+b", buffering=0)  # noqa: SIM115 - closed by the stack
        else:
            file = paths.MachinePaths(self.name).qemu_log
            with contextlib.suppress(FileNotFoundError):
                if file.stat().st_size > _LOG_MAX:
                    file.replace(file.with_suffix(".log.1"))
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._log = os.fdopen(fd, "a+b", buffering=0)
        stack.callback(self._log.close)
        self._log_start = os.fstat(self._log.fileno()).st_size

    def _prepare_files(self) -> None:
        """Give QEMU's user what it writes to, and make sure that it can reach what it reads."""
        plan = self.plan
        files = [plan.disk, plan.memory.file] + ([plan.boot.kernel, plan.boot.initramfs] if plan.boot else [])
        if console := plan.console:
            with contextlib.suppress(FileNotFoundError):
                if console.log.stat().st_size > _LOG_MAX:
                    console.log.replace(console.log.with_suffix(".log.1"))
            console.log.touch(mode=0o600, exist_ok=True)
            self._console_start = console.log.stat().st_size
            console.socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            console.socket.unlink(missing_ok=True)
            files += [console.log, console.socket.parent]
            template.own(console.log)
            template.own(console.socket.parent)
        if plan.disk:
            template.own(plan.disk)
        if os.geteuid() == 0:
            check_reachable(filter(None, files), system_user())

    async def _launch_error(self, problem: str) -> LaunchError:
        assert self._child
        if self._child.status is not None:
            problem = f"QEMU ended with {_status_text(self._child.status)} before the guest was ready"
        elif not problem:
            problem = "QEMU closed its monitor before the guest was ready"
        return LaunchError(
            f"machine {self.name!r} did not start: {problem}",
            log_tail=self.log_tail(),
            hint=f"see `pbotvm-qemu logs {self.name}` and `pbotvm-qemu doctor`",
        )

    def log_tail(self) -> str:
        """Return the end of what this QEMU, and the kernel of a clone, printed."""
        if self._log is None or self._log.closed:
            return ""
        return _gist(os.pread(self._log.fileno(), 1 << 20, self._log_start))

    def _console_tail(self) -> str:
        """Return the end of what the guest's kernel printed on a console of its own."""
        if self.plan.console is None:
            return ""
        try:
            with self.plan.console.log.open("rb") as file:
                file.seek(self._console_start)
                return _gist(file.read(1 << 20))
        except OSError:
            return ""

    def last_words(self) -> str:
        """Return how this QEMU, which has ended, ended: its status, the reason it gave, and the end of its log."""
        assert self._child
        status = self._child.status
        how = "it still runs" if status is None else _status_text(status)
        reason = self._monitor.shutdown_reason if self._monitor else ""
        if reason in _GUEST_ENDS:
            how = f"{reason}, {_GUEST_ENDS[reason]}"
        said = [
            f"{whose}: {text}"
            for whose, text in (("its log", self.log_tail()), ("the guest's console", self._console_tail()))
            if text
        ]
        return "; ".join([f"QEMU died ({how})", *(said or ["its log is empty"])])

    # Life ------------------------------------------------------------------------------------------------------------

    async def execute(
        self,
        spec: RunSpec,
        content: Sequence[bytes],
        *,
        on_output: OnOutput,
        stdin: AsyncIterator[bytes] | None = None,
        started: Callable[[], None] | None = None,
    ) -> Outcome:
        """Run a program in the guest, see Channel.execute.

        Raises RunLostError that shows QEMU's end when QEMU died.
        """
        await self.attachment.lead_forwards()
        work = asyncio.ensure_future(
            self.channel.execute(spec, content, on_output=on_output, stdin=stdin, started=started)
        )
        try:
            return await self._watched(work)
        except GuestError as exc:
            assert self._child
            await self._child.wait(1.0)
            if self._child.status is None:
                raise
            raise RunLostError(
                f"the machine was lost while the program ran: {self.last_words()}",
                hint=f"the program may have run; the machine starts clean for the next one; see `pbotvm-qemu logs {self.name}`",
            ) from exc

    async def _watched(self, work: asyncio.Future[Outcome]) -> Outcome:
        """Return what `work` gives. Raises RunLostError when QEMU is stopped meanwhile: its guest will never answer."""
        try:
            while not (await asyncio.wait({work}, timeout=_LOOK))[0]:
                if process.stopped(self.pid):
                    raise RunLostError(
                        f"QEMU {self.pid} was stopped (SIGSTOP) while the program ran",
                        hint="the program may have run; the machine is replaced",
                    )
            return work.result()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def sleep(self) -> None:
        """Stop the guest's processors, so that it costs nothing until `wake`. Raises MonitorError."""
        await self.monitor.execute("stop")

    async def wake(self) -> None:
        """Let a sleeping guest go on, with the right time. Raises MonitorError when QEMU does not answer at once."""
        await self.monitor.execute("cont", timeout=_WAKE_TIMEOUT)
        # The guest's clock slept too. Nobody waits for the answer: the agent reads its frames in order, so the next run
        # sees the right time.
        self.channel.resume_soon(self._hostname)

    async def set_network(self, *, on: bool) -> None:
        """Switch the guest's network card on or off. Raises GuestError when it has none, or refuses."""
        await self.channel.switch_network(self.attachment.resume if on else None)

    async def revert(self, tag: str, *, timeout: float) -> None:
        """Go back to snapshot `tag` in this process and make sure that the agent answers.

        Raises MonitorError when QEMU refuses (the guest runs on as before), GuestError when the agent stays silent.
        """
        await self.monitor.snapshot_load(tag, DISK, timeout=timeout)
        # The guest has forgotten its end of the conversation, and would never say so.
        await self._hang_up()
        self.hello = await self._greet(timeout)

    async def freeze(self, state_file: int) -> None:
        """Stop the guest for good and write its state, without its shared memory, to the open file `state_file`.

        Afterwards only the end is left for this process. Raises MonitorError when QEMU cannot.
        """
        await self.sleep()
        await self.monitor.save_state(state_file, without_memory=True, timeout=SAVE_TIMEOUT)

    async def save(self) -> template.SavedState:
        """Return a copy of the guest as it is now, memory and disk included; the guest then goes on.

        Only for a machine that was thawed. Raises MonitorError or HostError; the guest goes on then, too.
        """
        assert self._disk
        folder = paths.MachinePaths(self.name).clones
        with ExitStack() as undo:
            state_file = undo.enter_context(tempfile.TemporaryFile(dir=folder, prefix=".state-"))
            disk = undo.enter_context(tempfile.TemporaryFile(dir=folder, prefix=".overlay-"))
            # QEMU takes a descriptor out of a set only when its access mode is just the one that is wanted.
            with paths.open_file(state_file.fileno()).open("wb", buffering=0) as writable:
                await self.sleep()
                try:
                    await self.monitor.save_state(writable.fileno(), without_memory=False, timeout=SAVE_TIMEOUT)
                    source = paths.open_file(self._disk.fileno())
                    await asyncio.to_thread(template.copy_into, source, disk.fileno())
                except OSError as exc:
                    raise HostError(
                        f"cannot save the machine in {folder}: {exc.strerror}", hint="free some space"
                    ) from exc
                finally:
                    await self.monitor.execute("cont")
            undo.pop_all()
        return template.SavedState(state_file, disk)

    # End -------------------------------------------------------------------------------------------------------------

    async def watch(self, config: WatchdogConfig, idle: Callable[[], bool]) -> str:
        """Return why this machine must be put back, once that is so; see Watchdog."""
        reason = await Watchdog(
            config,
            cpu=lambda: process.cpu_seconds(self.pid),
            ping=lambda within: self.channel.ping(timeout=within),
            lost=self.channel.lost,
            idle=idle,
        ).offence()
        if reason == LOST:  # when it was QEMU that went, its end is the better reason, and comes in a moment
            await asyncio.wait({self.exited}, timeout=1.0)
        return reason

    async def _quit(self) -> None:
        """Ask QEMU to end by itself, when its files outlive it."""
        assert self._child
        if self.plan.disk is None:
            await self._child.kill()
            return
        with contextlib.suppress(PbotVMError):  # it did not listen: _reap has other means
            if self._child.status is None:
                await self.monitor.execute("quit", timeout=2.0)
                await self._child.wait(2.0)

    async def _reap(self) -> None:
        """End a QEMU that did not quit: terminate, then kill. Nothing of it is left when this returns."""
        assert self._child
        if self._child.status is None and self.plan.disk is not None:
            self._child.send(process.TERMINATE)
            await self._child.wait(2.0)
        if self._child.status is None:
            await self._child.kill()
        if self._child.status is None:
            log.error("QEMU %d of machine %s cannot be killed", self.pid, self.name)


async def _entered(stack: AsyncExitStack, manager: AbstractAsyncContextManager[T]) -> T:
    return await stack.enter_async_context(manager)


def _gist(printed: bytes) -> str:
    """Return the lines of what was printed in which a kernel says why it gave up, else the end."""
    if b"Kernel panic - " not in printed:
        return tail(printed)
    telling = [line for line in printed.splitlines() if _TELLING.search(line)]
    panics = [line for line in telling if b"Kernel panic - " in line]
    return tail(b"\n".join([*telling[: telling.index(panics[0])][:3], panics[0]]), lines=4)


def _status_text(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name
    return f"signal {-status}"
