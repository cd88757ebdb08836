"""What decides a machine: its command line as a pure function of frozen data, and its fingerprint.

`qemu-command` prints what `VirtualMachine` starts, because both ask `command`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import pwd
import shlex
import socket
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pbotvm_qemu import accel, net, paths, process, transports
from pbotvm_qemu.config import LOOPBACK
from pbotvm_qemu.errors import HostError, StateError
from pbotvm_qemu.guest import wire

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pbotvm_qemu.config import MachineConfig, NetworkConfig
    from pbotvm_qemu.image import Image
    from pbotvm_qemu.state import MachineRecord

SLOT = "slot0"  # where a device can be plugged into a running guest
DISK = "disk0"  # block node of the machine's qcow2 file
_AGENT_PORT = "org.pbotvm.agent"
_VSOCK = "/dev/vhost-vsock"
_VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60  # linux/vhost.h: _IOW(VHOST_VIRTIO, 0x60, __u64)
_CID_FIRST = 3  # the kernel keeps those below for itself
_CID_TRIES = 4096
_SYSTEM_USERS = ("pbotvm", "nobody")
_OVERLAY_SET = 1  # numbers of the descriptor sets that QEMU opens as /dev/fdset/N
_CONSOLE_SET = 2
_MACHINE_TYPE = "q35"
QEMU = "QEMU program"  # in a fingerprint
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

_KERNEL_COMMAND_LINE = (
    # panic=-1 with -no-reboot: a guest that panics ends QEMU, and so is noticed at once.
    "console=ttyS0 quiet loglevel=3 panic=-1 net.ifnames=0 random.trust_cpu=on "
    # The machine is thrown away after each run and QEMU is the boundary: its kernel need not defend itself slowly.
    "mitigations=off rcupdate.rcu_expedited=1 no_timer_check 8250.nr_uarts=4"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptors:
    """The numbers of the open files that QEMU inherits."""

    monitor: int = 3
    agent: int = 4
    vsock: int | None = None
    overlay: int | None = None  # the disk of a clone, a file without a name
    console: int | None = None  # where a clone's serial console is written
    serial: int | None = None  # the third serial line of a clone
    memory: int | None = None  # a clone's own copy of the frozen memory, where nothing is shared
    taps: tuple[int, ...] = ()  # one for each queue of the network card
    vhosts: tuple[int, ...] = ()

    def numbers(self) -> list[int]:
        """Return those that are in use."""
        every = (
            self.monitor,
            self.agent,
            self.vsock,
            self.overlay,
            self.console,
            self.serial,
            self.memory,
            *self.taps,
            *self.vhosts,
        )
        return [number for number in every if number is not None]


@dataclass(frozen=True, slots=True)
class Boot:
    """What a cold boot, or a restore that may reboot, reads."""

    kernel: Path
    initramfs: Path


@dataclass(frozen=True, slots=True)
class Console:
    """The guest's first serial line as something that can be watched."""

    socket: Path
    log: Path


@dataclass(frozen=True, slots=True)
class Memory:
    """Where the guest's memory lives: by default nowhere but in the process.

    `shared` writes go to the file (a template in the making), otherwise they stay in the process (copy on write).
    Without a file, `shared`
    memory can be seen by a vhost-user daemon. `protected` has QEMU open the file for reading only, which it can from 8.2 on.
    """

    file: Path | None = None
    shared: bool = False
    protected: bool = False

    def argument(self, size: str) -> str:
        """Return the value of QEMU's -object."""
        if self.file is None:
            if self.shared:
                return f"memory-backend-memfd,id=ram0,size={size},share=on"
            return f"memory-backend-ram,id=ram0,size={size}"
        rights = ",readonly=on,rom=off" if self.protected and not self.shared else ""
        share = "on" if self.shared else "off"
        return f"memory-backend-file,id=ram0,size={size},mem-path={escape(self.file)},share={share}{rights}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that decides a machine's command line."""

    config: MachineConfig
    uuid: str
    qemu: str
    accelerator: str
    vsock: bool
    vhost: bool = False
    network: NetworkConfig | None = None  # None: the network card, when there is one, leads nowhere
    boot: Boot | None = None  # None: what runs comes with the memory that is restored
    disk: Path | None = None  # None: a descriptor, see Descriptors.overlay
    console: Console | None = None  # None: a descriptor, see Descriptors.console
    memory: Memory = field(default_factory=Memory)
    loadvm: str | None = None
    serial_inherited: bool = False  # the third serial line is a socket that QEMU inherits, not a TCP port
    transport: str = transports.AUTO  # how the agent is reached
    transport_problem: str = ""  # why a vhost-user daemon cannot serve this way back to clean
    incoming: bool = False  # wait for a state over QMP

    @classmethod
    def of(cls, record: MachineRecord, image: Image, *, loadvm: str | None) -> Self:
        """Return the plan that starts machine `record`, cold or from snapshot `loadvm`."""
        machine = paths.MachinePaths(record.name, record.build)
        return cls(
            config=record.machine,
            uuid=record.uuid,
            qemu=record.qemu,
            accelerator=record.accelerator,
            vsock=record.fingerprint.get("vsock") == "yes",
            vhost=record.fingerprint.get("vhost-net") == "yes",
            boot=Boot(image.kernel, machine.initramfs),
            disk=machine.disk,
            console=Console(machine.console_socket, machine.console_log),
            loadvm=loadvm,
        )

    def restored(self, memory: Memory) -> Plan:
        """Return the plan of a clone: the same hardware, a state that comes over QMP, and no file of its own.

        The kernel is not named again: it is in the restored memory, and QEMU would read it for nothing.
        """
        quiet = replace(self.config, serial=0, health=0)  # one TCP port cannot serve many clones
        return replace(
            self,
            config=quiet,
            boot=None,
            disk=None,
            console=None,
            memory=memory,
            loadvm=None,
            serial_inherited=True,
            incoming=True,
        )


def escape(value: str | Path) -> str:
    """Return `value` for use inside a QEMU option list, where a comma is written twice."""
    return str(value).replace(",", ",,")


def _kernel_command_line(config: MachineConfig) -> str:
    return f"{_KERNEL_COMMAND_LINE} pbotvm.vport={config.vport}"


def devices(plan: Plan, descriptors: Descriptors) -> list[str]:
    """Return the arguments that make the hardware; what they say must be the same when a state is restored."""
    config = plan.config
    size = f"{config.memory >> 20}M"
    disk = plan.disk or Path(f"/dev/fdset/{_OVERLAY_SET}")
    argv = [
        "-machine", f"{_MACHINE_TYPE},memory-backend=ram0,usb=off,vmport=off,smm=off,graphics=off,dump-guest-core=off",
        *accel.arguments(plan.accelerator),
        "-smp", f"{config.cpus},sockets=1,cores={config.cpus},threads=1",
        "-m", f"size={size}",
        "-object", plan.memory.argument(size),
        "-rtc", "base=utc",
        "-device", "vmgenid,guid=auto,id=vmgenid0",
        "-object", "rng-random,id=rng0,filename=/dev/urandom",
        "-device", "virtio-rng-pci,rng=rng0,id=virtio-rng0",
        # cache.no-flush: nothing on this disk outlives the run, so nobody waits for the host's disk.
        "-blockdev", f"driver=file,node-name={DISK}-file,filename={escape(disk)},cache.no-flush=on,discard=unmap",
        "-blockdev", f"driver=qcow2,node-name={DISK},file={DISK}-file,cache.no-flush=on,discard=unmap",
        "-device", f"virtio-blk-pci,drive={DISK},id=virtio-{DISK},bootindex=1",
        "-device", "virtio-serial-pci,id=virtio-serial0,max_ports=4",
        "-chardev", f"socket,id=agent,fd={descriptors.agent}",
        "-device", f"virtserialport,bus=virtio-serial0.0,nr=1,chardev=agent,name={_AGENT_PORT}",
        "-chardev", _console(plan.console),
        "-device", "isa-serial,chardev=console,index=0",
        "-chardev", f"socket,id=serial,fd={descriptors.serial}" if plan.serial_inherited else _tcp("serial", config.serial),
        "-device", "isa-serial,chardev=serial,index=2,irq=5",  # not ISA's irq 4, which the console has
        "-chardev", _tcp("health", config.health),
        "-device", "isa-serial,chardev=health,index=3,irq=10",
    ]  # fmt: skip
    if plan.vsock:
        argv += ["-device", f"vhost-vsock-pci,id=vsock0,guest-cid={config.cid},vhostfd={descriptors.vsock}"]
    argv += net.policy_arguments(config.net, taps=descriptors.taps, vhosts=descriptors.vhosts)
    return argv + (["-device", f"pcie-root-port,id={SLOT},chassis=1,slot=1"] if config.vport else [])


def _imagined(plan: Plan) -> Descriptors:
    """Return numbers for the descriptors that `plan` needs, where QEMU is not started."""
    free = itertools.count(9)
    taps = net.imagined(plan.config.net, plan.config.cpus)
    return Descriptors(
        overlay=None if plan.disk else 5,
        console=None if plan.console else 6,
        vsock=7 if plan.vsock else None,
        serial=8 if plan.serial_inherited else None,
        taps=tuple(next(free) for _ in range(taps)),
        vhosts=tuple(next(free) for _ in range(taps if plan.vhost else 0)),
    )


def _console(console: Console | None) -> str:
    if console is None:
        return f"file,id=console,path=/dev/fdset/{_CONSOLE_SET},append=on"
    return (
        f"socket,id=console,path={escape(console.socket)},server=on,wait=off,logfile={escape(console.log)},logappend=on"
    )


def _tcp(name: str, port: int) -> str:
    if not port:
        return f"null,id={name}"
    return f"socket,id={name},host={LOOPBACK},port={port},server=on,wait=off,nodelay=on"


def command(plan: Plan, descriptors: Descriptors) -> list[str]:
    """Return the argument list that starts QEMU, with the program that drops its rights in front."""
    argv = [
        *unprivileged(plan.accelerator),
        plan.qemu,
        "-name", f"guest={escape(plan.config.name)},debug-threads=on",
        "-uuid", plan.uuid,
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-msg", "timestamp=on",
        "-sandbox", SANDBOX,
    ]  # fmt: skip
    if plan.transport != transports.DAEMON:  # a device that cannot be saved fails at launch, not at the snapshot
        argv.append("-only-migratable")
    for number, descriptor in ((_OVERLAY_SET, descriptors.overlay), (_CONSOLE_SET, descriptors.console)):
        if descriptor is not None:
            argv += ["-add-fd", f"fd={descriptor},set={number}"]
    argv += [
        "-chardev", f"socket,id=monitor,fd={descriptors.monitor}",
        "-mon", "chardev=monitor,mode=control",
        *devices(plan, descriptors),
    ]  # fmt: skip
    if plan.boot:
        argv += ["-kernel", str(plan.boot.kernel), "-initrd", str(plan.boot.initramfs)]
        argv += ["-append", _kernel_command_line(plan.config)]
    if plan.loadvm:
        argv += ["-loadvm", plan.loadvm]
    if plan.incoming:
        argv += ["-incoming", "defer", "-S"]
    return argv


def command_text(plan: Plan) -> str:
    """Return the command line as one would type it, an option and its value to a line."""
    descriptors = _imagined(plan)
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


def unprivileged(accelerator: str = "") -> list[str]:
    """Return the front part that gives up rights, and has the kernel kill the program when we die, however we die."""
    setpriv = process.find_program("setpriv", package="util-linux")
    argv = [setpriv, "--no-new-privs", "--pdeathsig", "KILL"]
    if os.geteuid() == 0:
        user = system_user()
        groups = [str(Path("/dev/kvm").stat().st_gid)] if accelerator == "kvm" else []
        argv += ["--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--inh-caps=-all", "--bounding-set=-all"]
        argv += ["--groups", ",".join(groups)] if groups else ["--clear-groups"]
    return [*argv, "--"]


def qemu_identity(qemu: str) -> str:
    """Return what tells one build of the program `qemu` from another. Raises OSError when it is not there."""
    binary = Path(qemu).stat()
    return f"{qemu} of {binary.st_size} bytes, changed {int(binary.st_mtime)}"


def check_qemu(name: str, qemu: str, fingerprint: Mapping[str, str]) -> None:
    """Raise StateError when the program `qemu` is not the one that machine `name` was made with."""
    was = fingerprint.get(QEMU, "unknown")
    try:
        now = qemu_identity(qemu)
    except OSError as exc:
        now = f"{qemu}: {exc.strerror}"
    if now != was:
        raise StateError(
            f"machine {name!r} was made with another {QEMU} (was {was[:80]}, is {now[:80]})",
            hint=f"run `pbotvm-qemu create --force {name}`",
        )


def fingerprint(
    config: MachineConfig,
    image: Image,
    qemu: str,
    accelerator: str,
    initramfs_sha256: str,
    *,
    vsock: bool,
    vhost: bool = False,
) -> dict[str, str]:
    """Return what a snapshot depends on, by name. Loading it with anything else is corruption, not an error message."""
    files = {name: digest for name, _size, digest in image.files}
    hardware = Plan(
        # The TCP ports are the host's affair, and no part of the guest's state.
        config=replace(config, serial=0, health=0, cid=0),
        uuid="",
        qemu="",
        accelerator=accelerator,
        vsock=vsock,
        vhost=vhost,
    )
    # What is at the other end of the card's cable is no part of the guest's state either.
    numbers = replace(_imagined(hardware), vsock=None)
    return {
        QEMU: qemu_identity(qemu),
        "machine type": _MACHINE_TYPE,
        "accelerator": accelerator,
        "CPU model": " ".join(accel.arguments(accelerator)),
        "memory": f"{config.memory} bytes",
        "processors": str(config.cpus),
        "devices": _digest("\0".join(devices(hardware, numbers)).encode()),
        "kernel": files["vmlinuz"],
        "root image": files["root.qcow2"],
        "initramfs": initramfs_sha256,
        "kernel command line": _digest(_kernel_command_line(config).encode()),
        "agent protocol": str(wire.VERSION),
        "vsock": "yes" if vsock else "no",
        "vhost-net": "yes" if vhost else "no",
    }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_fingerprint(record: MachineRecord, image: Image) -> None:
    """Raise StateError that names the first thing that differs from when the snapshot of `record` was made."""
    again = f"run `pbotvm-qemu create --force {record.name}`"
    initramfs = paths.MachinePaths(record.name, record.build).initramfs
    try:
        now = fingerprint(
            record.machine, image, record.qemu, record.accelerator, _digest(initramfs.read_bytes()),
            vsock=record.fingerprint.get("vsock") == "yes", vhost=record.fingerprint.get("vhost-net") == "yes",
        )  # fmt: skip
    except OSError as exc:
        raise StateError(f"machine {record.name!r} lacks {exc.filename}: {exc.strerror}", hint=again) from exc
    for name, value in now.items():
        if record.fingerprint.get(name) != value:
            was = record.fingerprint.get(name, "unknown")
            raise StateError(
                f"machine {record.name!r} was made with another {name} (was {was[:80]}, is {value[:80]})", hint=again
            )


def has_vsock() -> bool:
    """Tell whether QEMU can get a kernel vsock device on this host."""
    return os.access(_VSOCK, os.R_OK | os.W_OK)


def open_vsock(cid: int) -> tuple[int, int]:
    """Return a descriptor of the vsock device and the context id that it holds: `cid`, or the next one that is free.

    A machine that was made with the device cannot be restored without it: of one that is not to be used `cid` is 0, and
    any will do. The kernel keeps the id for that descriptor, so between the look and QEMU's start nobody else can take it. Raises
    HostError when the device cannot be opened or no id is free.
    """
    try:
        fd = os.open(_VSOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise HostError(f"cannot open {_VSOCK}: {exc.strerror}", hint="modprobe vhost_vsock") from exc
    first = max(cid, _CID_FIRST)
    for candidate in range(first, first + _CID_TRIES):
        try:
            fcntl.ioctl(fd, _VHOST_VSOCK_SET_GUEST_CID, struct.pack("Q", candidate))
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                continue
            os.close(fd)
            raise HostError(f"cannot take vsock context id {candidate}: {exc.strerror}") from exc
        return fd, candidate
    os.close(fd)
    raise HostError(f"no vsock context id from {first} on is free", hint="choose another with PBOTVM_CID")


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
