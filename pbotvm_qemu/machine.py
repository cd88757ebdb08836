"""VirtualMachine: one QEMU process, its devices, its channel, its end.

The command line is a pure function of frozen data (`command`), so `qemu-command` prints what `VirtualMachine` starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import pwd
import shlex
import signal
import socket
import time
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from pbotvm_qemu import accel, net, paths, process, qmp
from pbotvm_qemu.channel import Channel, Hello
from pbotvm_qemu.config import LOOPBACK
from pbotvm_qemu.errors import (
    GuestError,
    HostError,
    LaunchError,
    MonitorError,
    PbotVMError,
    RunLostError,
    StateError,
    tail,
)
from pbotvm_qemu.guest import wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager

    from pbotvm_qemu.channel import OnOutput, Outcome
    from pbotvm_qemu.config import MachineConfig
    from pbotvm_qemu.guest.spec import RunSpec
    from pbotvm_qemu.image import Image
    from pbotvm_qemu.state import MachineRecord

T = TypeVar("T")

log = logging.getLogger(__name__)

DISK = "disk0"  # block node of the machine's qcow2 file
_AGENT_PORT = "org.pbotvm.agent"
_VSOCK = "/dev/vhost-vsock"
_LOG_MAX = 1 << 20  # bytes; a longer log is put aside before the next start
_SYSTEM_USERS = ("pbotvm", "nobody")
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

# Seconds. Emulation is about ten times slower than hardware, and hosts are busy.
BOOT_TIMEOUT = {"kvm": 30.0, "tcg": 120.0}
RESTORE_TIMEOUT = {"kvm": 15.0, "tcg": 60.0}

_KERNEL_COMMAND_LINE = (
    # panic=-1 with -no-reboot: a guest that panics ends QEMU, and so is noticed at once.
    "console=ttyS0 quiet loglevel=3 panic=-1 net.ifnames=0 random.trust_cpu=on "
    # The machine is thrown away after each run and QEMU is the boundary: its kernel need not defend itself slowly.
    "mitigations=off rcupdate.rcu_expedited=1 no_timer_check 8250.nr_uarts=4"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptors:
    """The numbers of the open sockets that QEMU inherits."""

    monitor: int = 3
    agent: int = 4
    vsock: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that decides a machine's command line."""

    config: MachineConfig
    uuid: str
    qemu: str
    accelerator: str
    kernel: Path
    initramfs: Path
    disk: Path
    console_socket: Path
    console_log: Path
    vsock: bool
    loadvm: str | None = None

    @classmethod
    def of(cls, record: MachineRecord, image: Image, *, loadvm: str | None) -> Self:
        """Return the plan that starts machine `record`, cold or from snapshot `loadvm`."""
        machine = paths.MachinePaths(record.name)
        return cls(
            config=record.machine,
            uuid=record.uuid,
            qemu=record.qemu,
            accelerator=record.accelerator,
            kernel=image.kernel,
            initramfs=machine.initramfs,
            disk=machine.disk,
            console_socket=machine.console_socket,
            console_log=machine.console_log,
            vsock=record.fingerprint.get("vsock") == "yes",
            loadvm=loadvm,
        )


def escape(value: str | Path) -> str:
    """Return `value` for use inside a QEMU option list, where a comma is written twice."""
    return str(value).replace(",", ",,")


def devices(plan: Plan, descriptors: Descriptors) -> list[str]:
    """Return the arguments that make the hardware; what they say must be the same when a snapshot is loaded."""
    config = plan.config
    size = f"{config.memory >> 20}M"
    argv = [
        "-machine", "q35,memory-backend=ram0,usb=off,vmport=off,smm=off,graphics=off,dump-guest-core=off",
        *accel.arguments(plan.accelerator),
        "-smp", f"{config.cpus},sockets=1,cores={config.cpus},threads=1",
        "-m", f"size={size}",
        "-object", f"memory-backend-ram,id=ram0,size={size}",
        "-rtc", "base=utc",
        "-device", "vmgenid,guid=auto,id=vmgenid0",
        "-object", "rng-random,id=rng0,filename=/dev/urandom",
        "-device", "virtio-rng-pci,rng=rng0,id=virtio-rng0",
        # cache.no-flush: nothing on this disk outlives the run, so nobody waits for the host's disk.
        "-blockdev", f"driver=file,node-name={DISK}-file,filename={escape(plan.disk)},cache.no-flush=on,discard=unmap",
        "-blockdev", f"driver=qcow2,node-name={DISK},file={DISK}-file,cache.no-flush=on,discard=unmap",
        "-device", f"virtio-blk-pci,drive={DISK},id=virtio-{DISK},bootindex=1",
        "-device", "virtio-serial-pci,id=virtio-serial0,max_ports=4",
        "-chardev", f"socket,id=agent,fd={descriptors.agent}",
        "-device", f"virtserialport,bus=virtio-serial0.0,nr=1,chardev=agent,name={_AGENT_PORT}",
        "-chardev", (f"socket,id=console,path={escape(plan.console_socket)},server=on,wait=off,"
                    f"logfile={escape(plan.console_log)},logappend=on"),
        "-device", "isa-serial,chardev=console,index=0",
        "-chardev", _tcp("serial", config.serial),
        "-device", "isa-serial,chardev=serial,index=2,irq=5",  # not ISA's irq 4, which the console has
        "-chardev", _tcp("health", config.health),
        "-device", "isa-serial,chardev=health,index=3,irq=10",
    ]  # fmt: skip
    if plan.vsock:
        argv += ["-device", f"vhost-vsock-pci,id=vsock0,guest-cid={config.cid},vhostfd={descriptors.vsock}"]
    return argv + net.policy_arguments("none")


def _tcp(name: str, port: int) -> str:
    if not port:
        return f"null,id={name}"
    return f"socket,id={name},host={LOOPBACK},port={port},server=on,wait=off,nodelay=on"


def command(plan: Plan, descriptors: Descriptors) -> list[str]:
    """Return the argument list that starts QEMU, with the program that drops its rights in front."""
    return [
        *_unprivileged(plan.accelerator),
        plan.qemu,
        "-name", f"guest={escape(plan.config.name)},debug-threads=on",
        "-uuid", plan.uuid,
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-only-migratable",
        "-msg", "timestamp=on",
        "-sandbox", SANDBOX,
        "-chardev", f"socket,id=monitor,fd={descriptors.monitor}",
        "-mon", "chardev=monitor,mode=control",
        *devices(plan, descriptors),
        "-kernel", str(plan.kernel),
        "-initrd", str(plan.initramfs),
        "-append", _KERNEL_COMMAND_LINE,
        *(["-loadvm", plan.loadvm] if plan.loadvm else []),
    ]  # fmt: skip


def command_text(plan: Plan) -> str:
    """Return the command line as one would type it, an option and its value to a line."""
    descriptors = Descriptors(vsock=5 if plan.vsock else None)
    lines: list[list[str]] = [[]]
    for word in command(plan, descriptors):
        if word.startswith("-") and lines[-1]:
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(shlex.join(line) for line in lines)


def system_user() -> pwd.struct_passwd:
    """Return the user that QEMU runs as when we are root. Raises HostError when there is none."""
    for name in _SYSTEM_USERS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise HostError(
        "there is no user that QEMU could run as",
        hint="useradd --system --no-create-home --shell /usr/sbin/nologin pbotvm",
    )


def _unprivileged(accelerator: str) -> list[str]:
    """Return the front part that gives up rights, and has the kernel kill QEMU when we die, however we die."""
    setpriv = process.find_program("setpriv", package="util-linux")
    argv = [setpriv, "--no-new-privs", "--pdeathsig", "KILL"]
    if os.geteuid() == 0:
        user = system_user()
        groups = [str(Path("/dev/kvm").stat().st_gid)] if accelerator == "kvm" else []
        argv += ["--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--inh-caps=-all", "--bounding-set=-all"]
        argv += ["--groups", ",".join(groups)] if groups else ["--clear-groups"]
    return [*argv, "--"]


def fingerprint(
    config: MachineConfig, image: Image, qemu: str, accelerator: str, initramfs_sha256: str, *, vsock: bool
) -> dict[str, str]:
    """Return what a snapshot depends on, by name. Loading it with anything else is corruption, not an error message."""
    binary = Path(qemu).stat()
    files = {name: digest for name, _size, digest in image.files}
    hardware = Plan(
        # The TCP ports are the host's affair, and no part of the guest's state.
        config=replace(config, serial=0, health=0), uuid="", qemu="", accelerator=accelerator, kernel=Path(), initramfs=Path(), disk=Path(),
        console_socket=Path(), console_log=Path(), vsock=vsock,
    )  # fmt: skip
    return {
        "QEMU program": f"{qemu} of {binary.st_size} bytes, changed {int(binary.st_mtime)}",
        "accelerator": accelerator,
        "devices": _digest("\0".join(devices(hardware, Descriptors())).encode()),
        "kernel": files["vmlinuz"],
        "root image": files["root.qcow2"],
        "initramfs": initramfs_sha256,
        "kernel command line": _digest(_KERNEL_COMMAND_LINE.encode()),
        "agent protocol": str(wire.VERSION),
        "vsock": "yes" if vsock else "no",
    }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_fingerprint(record: MachineRecord, image: Image) -> None:
    """Raise StateError that names the first thing that differs from when the snapshot of `record` was made."""
    again = f"run `pbotvm-qemu create --force {record.name}`"
    initramfs = paths.MachinePaths(record.name).initramfs
    try:
        now = fingerprint(
            record.machine, image, record.qemu, record.accelerator, _digest(initramfs.read_bytes()),
            vsock=record.fingerprint.get("vsock") == "yes",
        )  # fmt: skip
    except OSError as exc:
        raise StateError(f"machine {record.name!r} lacks {exc.filename}: {exc.strerror}", hint=again) from exc
    for name, value in now.items():
        if record.fingerprint.get(name) != value:
            was = record.fingerprint.get(name, "unknown")
            raise StateError(
                f"machine {record.name!r} was made with another {name} (was {was[:80]}, is {value[:80]})", hint=again
            )


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
    async with VirtualMachine(Plan.of(record, image, loadvm="1")) as vm:
        outcome = await vm.execute(spec, content, on_output=show)
    ```

    Starting raises LaunchError with the end of QEMU's log when QEMU ends or its guest stays silent, HostError when a
    port is taken or rights are missing.
    """

    def __init__(self, plan: Plan, *, on_started: Callable[[int], None] | None = None) -> None:
        self.plan = plan
        self.name = plan.config.name
        self.hello: Hello | None = None
        self.ready_s = 0.0  # seconds from the start of QEMU to the agent's answer
        self._on_started = on_started
        self._stack = AsyncExitStack()
        self._child: process.Child | None = None
        self._monitor: qmp.Monitor | None = None
        self._channel: Channel | None = None
        self._log_start = 0

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:  # whatever is raised below, what came before is undone
            await self._start(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_exc: object) -> None:
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

    async def _start(self, stack: AsyncExitStack) -> None:
        plan = self.plan
        started = time.monotonic()
        for port in (plan.config.serial, plan.config.health):
            check_port(port)
        with ExitStack() as theirs:  # our copies of QEMU's ends are closed as soon as it has them
            ours_monitor, their_monitor = socket.socketpair()
            ours_agent, their_agent = socket.socketpair()
            stack.callback(ours_monitor.close)
            stack.callback(ours_agent.close)
            theirs.enter_context(their_monitor)
            theirs.enter_context(their_agent)
            vsock = os.open(_VSOCK, os.O_RDWR | os.O_CLOEXEC) if plan.vsock else None
            if vsock is not None:
                theirs.callback(os.close, vsock)
            self._prepare_files()
            descriptors = Descriptors(monitor=their_monitor.fileno(), agent=their_agent.fileno(), vsock=vsock)
            log_fd = os.open(paths.MachinePaths(self.name).qemu_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            theirs.callback(os.close, log_fd)
            self._log_start = os.fstat(log_fd).st_size
            inherited = [their_monitor.fileno(), their_agent.fileno(), *([] if vsock is None else [vsock])]
            self._child = await process.Child.start(command(plan, descriptors), pass_fds=inherited, log=log_fd)
        stack.push_async_callback(self._reap)
        if self._on_started:
            self._on_started(self.pid)
        within = (RESTORE_TIMEOUT if plan.loadvm else BOOT_TIMEOUT)[plan.accelerator]
        try:
            # A dead QEMU shows as a lost connection and as an ended process; the latter knows why.
            monitor = await ready_or_dead(_entered(stack, qmp.connect(self.name, ours_monitor)), self._child, within)
            self._channel = await Channel.open(ours_agent)
            stack.push_async_callback(self._channel.close)
            hello = await ready_or_dead(self._greet(within), self._child, within + 5) if monitor else None
        except (MonitorError, GuestError, TimeoutError) as exc:
            await self._child.wait(1.0)
            raise await self._launch_error(str(exc) or f"no sign of life within {within:.0f} s") from exc
        if monitor is None or hello is None:
            raise await self._launch_error("")
        self._monitor, self.hello = monitor, hello
        stack.push_async_callback(self._quit)  # first on the way out, while the monitor is still connected
        self.ready_s = time.monotonic() - started

    async def _greet(self, within: float) -> Hello:
        hello = await self.channel.handshake(within)
        await self.channel.resume(self.name[:63].replace("_", "-").replace(".", "-"))
        return hello

    def _prepare_files(self) -> None:
        """Put long logs aside and give QEMU's user what it writes to."""
        plan = self.plan
        machine = paths.MachinePaths(self.name)
        for file in (machine.qemu_log, plan.console_log):
            with contextlib.suppress(FileNotFoundError):
                if file.stat().st_size > _LOG_MAX:
                    file.replace(file.with_suffix(".log.1"))
        plan.console_log.touch(mode=0o600, exist_ok=True)
        plan.console_socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        plan.console_socket.unlink(missing_ok=True)
        if os.geteuid() == 0:
            user = system_user()
            for path in (plan.disk, plan.console_log, plan.console_socket.parent):
                os.chown(path, user.pw_uid, user.pw_gid)
            check_reachable(
                (plan.disk, plan.kernel, plan.initramfs, plan.console_log, plan.console_socket.parent), user
            )

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
        """Return the end of what this QEMU and its guest's kernel printed."""
        with contextlib.suppress(OSError), paths.MachinePaths(self.name).qemu_log.open("rb") as file:
            file.seek(self._log_start)
            return tail(file.read(1 << 20))
        return ""

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
        try:
            return await self.channel.execute(spec, content, on_output=on_output, stdin=stdin, started=started)
        except GuestError as exc:
            assert self._child
            await self._child.wait(1.0)
            if self._child.status is None:
                raise
            said = self.log_tail()
            raise RunLostError(
                f"QEMU died ({_status_text(self._child.status)}) while the program ran"
                + (f"; its log: {said}" if said else "; its log is empty"),
                hint=f"the program may have run; the machine starts clean for the next one; see `pbotvm-qemu logs {self.name}`",
            ) from exc

    async def revert(self, tag: str, *, timeout: float) -> None:
        """Go back to snapshot `tag` in this process and make sure that the agent answers.

        Raises MonitorError when QEMU refuses (the guest runs on as before), GuestError when the agent stays silent.
        """
        await self.monitor.snapshot_load(tag, DISK, timeout=timeout)
        self.hello = await self.channel.handshake(timeout)
        await self.channel.resume(self.name[:63].replace("_", "-").replace(".", "-"))

    async def _quit(self) -> None:
        """Ask QEMU to end by itself."""
        assert self._child
        with contextlib.suppress(PbotVMError):  # it did not listen: _reap has other means
            if self._child.status is None:
                await self.monitor.execute("quit", timeout=2.0)
                await self._child.wait(2.0)

    async def _reap(self) -> None:
        """End a QEMU that did not quit: terminate, then kill. Nothing of it is left when this returns."""
        assert self._child
        if self._child.status is None:
            self._child.send(process.TERMINATE)
            await self._child.wait(2.0)
        if self._child.status is None:
            await self._child.kill()
        if self._child.status is None:
            log.error("QEMU %d of machine %s cannot be killed", self.pid, self.name)


async def _entered(stack: AsyncExitStack, manager: AbstractAsyncContextManager[T]) -> T:
    return await stack.enter_async_context(manager)


def _status_text(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name
    return f"signal {-status}"


def has_vsock() -> bool:
    """Tell whether QEMU can get a kernel vsock device on this host."""
    return os.access(_VSOCK, os.R_OK | os.W_OK)


def check_port(port: int) -> None:
    """Raise HostError when TCP `port` of the loopback address is taken. 0 stands for no port."""
    if not port:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as QEMU does
        try:
            probe.bind((LOOPBACK, port))
        except OSError as exc:
            pid = process.listening_pid(port)
            by = f" by process {pid}" if pid else ""
            raise HostError(
                f"port {port} of {LOOPBACK} cannot be used: {exc.strerror}{by}",
                hint="free it, or choose others with PBOTVM_SERIAL and PBOTVM_HEALTH",
            ) from exc


def check_reachable(files: Iterable[Path], user: pwd.struct_passwd) -> None:
    """Raise HostError for the first of `files` that QEMU, as `user`, could not open because of a folder's mode."""
    for file in files:
        for folder in file.absolute().parents:
            found = folder.stat()
            allowed = found.st_mode & (0o100 if found.st_uid == user.pw_uid else 0o001)
            if not allowed:
                raise HostError(
                    f"QEMU runs as user {user.pw_name!r}, who may not enter {folder}",
                    hint=f"chmod o+x {shlex.quote(str(folder))}, or point XDG_DATA_HOME, XDG_CACHE_HOME and XDG_RUNTIME_DIR elsewhere",
                )
