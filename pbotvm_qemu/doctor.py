"""What this host can do, why not, and what to type. Looks and tries; changes nothing.

Each check is made on its own: one that cannot be made is a failed check, never an exception.
"""

from __future__ import annotations

import asyncio
import errno
import os
import pwd
import re
import shutil
import socket
import stat
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pbotvm_qemu import accel, image, paths, plan, process, qmp, state, template, transports, vhost_user
from pbotvm_qemu.config import LOOPBACK, format_size
from pbotvm_qemu.errors import HostError, ImageError, LaunchError, MonitorError, PbotVMError, StateError, tail
from pbotvm_qemu.network import netprobe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from pbotvm_qemu.config import Config
    from pbotvm_qemu.qmp import Monitor

Status = Literal["ok", "warn", "fail"]

QEMU = "qemu-system-x86_64"
QEMU_PACKAGE = "qemu-system-x86"
QEMU_OLDEST = (7, 2)  # what the project is tested with
USER = "pbotvm"

_QMP_TIMEOUT = 10.0  # seconds for QEMU to start, and for each answer
_VSOCK = Path("/dev/vhost-vsock")
_DISK_WARN = 8 << 30

# Without these no machine starts, or it cannot be put back to its snapshot.
_COMMANDS = ("snapshot-save", "snapshot-load")
_DEVICES = ("virtio-blk-pci", "virtio-serial-pci", "virtserialport", "virtio-rng-pci", "isa-serial", "vmgenid")
# Without these something is slower or left out.
_COMMANDS_WANTED = ("migrate-incoming", "add-fd")
_DEVICES_WANTED = ("vhost-vsock-pci",)

_IMAGE_TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "dpkg-deb": "dpkg",
    "tar": "tar",
}
_IMAGE_TOOLS_OF_USERS = {"fakeroot": "fakeroot", "newuidmap": "uidmap"}


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check: "ok", "warn" (something is slower or left out), or "fail" (machines cannot work)."""

    name: str
    status: Status
    detail: str  # what was found
    hint: str | None = None  # what to type, when not ok


@dataclass(frozen=True, slots=True)
class Features:
    """What a QEMU binary told about itself."""

    version: tuple[int, int, int]
    package: str  # the distribution's own version, may be empty
    commands: frozenset[str]
    devices: frozenset[str]
    sandbox_problem: str | None  # why it does not run inside its system call filter, None when it does


async def examine(config: Config, *, kernel: Path | None = None) -> tuple[Check, ...]:
    """Return all checks of this host for `config`, in a fixed order.

    `kernel` is what the accelerator is tried with, when it is not yet known; None means an image's, or the host's own.
    """
    kernel = kernel or next(iter(sorted(paths.images().glob("*/vmlinuz"))), None)
    qemu = shutil.which(QEMU) or _elsewhere(QEMU)
    groups = await asyncio.gather(
        _guarded("cpu", _cpu),
        _guarded("kvm", lambda: _kvm(qemu, kernel)),
        _guarded("qemu", lambda: _qemu(qemu)),
        _guarded("vhost-vsock", lambda: _vsock(config)),
        _guarded("vhost-user-vsock", lambda: _vhost_user(config)),
        _guarded("serial", lambda: _serial(config)),
        _guarded("network", _network),
        _guarded("image-tools", _image_tools),
        _guarded("setpriv", _setpriv),
        _guarded("privileges", _privileges),
        _guarded("images", _images),
        _guarded("templates", _templates),
        _guarded("disk", _disk),
        _guarded("memory", lambda: _memory(config)),
        _guarded("ports", lambda: _ports(config)),
    )
    return tuple(check for group in groups for check in group)


async def _guarded(name: str, check: Callable[[], Awaitable[Sequence[Check]]]) -> Sequence[Check]:
    try:
        return await check()
    except PbotVMError as exc:
        return [Check(name, "fail", str(exc), exc.hint)]
    except OSError as exc:
        return [Check(name, "fail", f"cannot be checked: {exc}")]


def _elsewhere(program: str) -> str | None:
    """Return the path of `program`, also where only root's PATH leads, or None."""
    try:
        return process.find_program(program, package="")
    except HostError:
        return None


# processor and accelerator ------------------------------------------------------------------------------------------


async def _cpu() -> list[Check]:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        text = ""
    match = re.search(r"^flags\s*:.*?\b(vmx|svm)\b", text, re.MULTILINE)
    flag = f"has {match[1]}" if match else "shows neither vmx nor svm"
    return [Check("cpu", "ok", f"{accel.cpu_model()}, {os.cpu_count()} CPUs, {flag}")]


async def _kvm(qemu: str | None, kernel: Path | None) -> list[Check]:
    if not qemu:
        return [Check("kvm", "warn", "not tried: there is no QEMU", f"apt-get install {QEMU_PACKAGE}")]
    verdict = await accel.choose(qemu, kernel)
    if verdict.name == "tcg":
        detail = (
            f"{verdict.reason}. TCG is used: guests are much slower, "
            "and QEMU's security policy does not count TCG as a security boundary"
        )
        return [Check("kvm", "warn", detail, _kvm_hint(qemu, verdict))]
    device = accel.DEVICE.stat()
    if os.geteuid() == 0 and not _reachable_by_others(device.st_mode):
        detail = f"{verdict.reason}, but QEMU gives up root, and {accel.DEVICE} is only for its owner"
        return [Check("kvm", "fail", detail, f"chmod g+rw {accel.DEVICE}")]
    return [Check("kvm", "ok", verdict.reason)]


def _kvm_hint(qemu: str, verdict: accel.Verdict) -> str | None:
    if not accel.DEVICE.exists():
        return "switch on virtualisation in the firmware, then: modprobe kvm_intel || modprobe kvm_amd"
    if not os.access(accel.DEVICE, os.R_OK | os.W_OK):
        return "usermod -aG kvm $USER, and log in again"
    if accel.cached(qemu) == verdict:
        return f"to try again: rm {paths.accelerator_verdicts()}"
    return None


def _reachable_by_others(mode: int) -> bool:
    """Tell whether a user who is given the device's group could open it for reading and writing."""
    return any(mode & bits == bits for bits in (stat.S_IRGRP | stat.S_IWGRP, stat.S_IROTH | stat.S_IWOTH))


# QEMU ---------------------------------------------------------------------------------------------------------------


async def _qemu(qemu: str | None) -> list[Check]:
    install = f"apt-get install {QEMU_PACKAGE}"
    if not qemu:
        return [
            Check("qemu", "fail", f"{QEMU} is not installed", install),
            Check("qemu-features", "fail", "not asked: there is no QEMU", install),
        ]
    try:
        features = await ask_qemu(qemu)
    except PbotVMError as exc:
        return [
            Check("qemu", "fail", f"{qemu}: {exc}", install),
            Check("qemu-features", "fail", "not asked: QEMU does not start", install),
        ]
    return [judge_version(qemu, features), judge_features(features)]


def judge_version(qemu: str, features: Features) -> Check:
    """Return the check "qemu" for what the binary `qemu` told."""
    version = ".".join(map(str, features.version))
    detail = f"{qemu} {version}" + (f" ({features.package})" if features.package else "")
    if features.version[:2] < QEMU_OLDEST:
        oldest = ".".join(map(str, QEMU_OLDEST))
        return Check("qemu", "warn", f"{detail} is older than {oldest}", f"install QEMU {oldest} or later")
    return Check("qemu", "ok", detail)


def judge_features(features: Features) -> Check:
    """Return the check "qemu-features" for what QEMU told."""
    name = "qemu-features"
    missing = [
        *(item for item in _COMMANDS if item not in features.commands),
        *(item for item in _DEVICES if item not in features.devices),
    ]
    if missing:
        hint = f"apt-get install {QEMU_PACKAGE} (a build with all devices)"
        return Check(name, "fail", f"QEMU lacks {', '.join(missing)}", hint)
    if features.sandbox_problem is not None:
        detail = f"QEMU does not start with -sandbox: {features.sandbox_problem}"
        return Check(name, "fail", detail, "use a QEMU that was built with seccomp")
    unwanted = [
        *(item for item in _COMMANDS_WANTED if item not in features.commands),
        *(item for item in _DEVICES_WANTED if item not in features.devices),
    ]
    if unwanted:
        return Check(name, "warn", f"QEMU lacks {', '.join(unwanted)}", f"apt-get install {QEMU_PACKAGE}")
    return Check(name, "ok", "snapshots, migration, all devices and -sandbox")


async def ask_qemu(qemu: str) -> Features:
    """Return what the binary `qemu` tells about itself over QMP.

    Raises CommandError, LaunchError or MonitorError when it cannot be started or asked.
    """
    problem = None
    async with AsyncExitStack() as stack:
        try:
            monitor = await stack.enter_async_context(_bare_qemu(qemu, ["-sandbox", plan.SANDBOX]))
        except LaunchError as exc:
            monitor = await stack.enter_async_context(_bare_qemu(qemu, []))
            problem = exc.log_tail or str(exc)
        version = await monitor.execute("query-version", timeout=_QMP_TIMEOUT)
        commands = await monitor.execute("query-commands", timeout=_QMP_TIMEOUT)
        devices = await monitor.execute("qom-list-types", implements="device", abstract=False, timeout=_QMP_TIMEOUT)
    try:
        return Features(_version(version), _package(version), _names(commands), _names(devices), problem)
    except (KeyError, TypeError, ValueError) as exc:
        raise MonitorError(f"QEMU's answer about itself makes no sense: {exc!r}") from exc


def _version(answer: object) -> tuple[int, int, int]:
    if not isinstance(answer, dict):
        raise TypeError("not an object")
    number = answer["qemu"]
    return int(number["major"]), int(number["minor"]), int(number["micro"])


def _package(answer: object) -> str:
    return str(answer.get("package", "")) if isinstance(answer, dict) else ""


def _names(answer: object) -> frozenset[str]:
    if not isinstance(answer, list):
        raise TypeError("not a list")
    return frozenset(str(item["name"]) for item in answer)


@asynccontextmanager
async def _bare_qemu(qemu: str, extra: list[str]) -> AsyncIterator[Monitor]:
    """Start QEMU without a machine, and kill it in the end.

    Raises CommandError when it cannot be started, LaunchError with what it said when its monitor does not answer.
    """
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryFile() as log, ours:
        with theirs:
            argv = [
                qemu,
                "-machine", "none",
                "-nodefaults", "-no-user-config", "-display", "none", "-S",
                "-chardev", f"socket,id=monitor,fd={theirs.fileno()}",
                "-mon", "chardev=monitor,mode=control",
                *extra,
            ]  # fmt: skip
            child = await process.Child.start(argv, pass_fds=(theirs.fileno(),), log=log.fileno())
        async with AsyncExitStack() as stack:
            stack.push_async_callback(child.kill)
            try:
                monitor = await stack.enter_async_context(qmp.connect("doctor", ours, timeout=_QMP_TIMEOUT))
            except MonitorError as exc:
                await child.wait(1.0)  # it has hung up; now it ends, and says why
                log.seek(0)
                how = f"QEMU ended with status {child.status}" if child.status is not None else str(exc)
                raise LaunchError(how, log_tail=tail(log.read(), lines=1), hint=f"run `{qemu} --version`") from exc
            yield monitor


# devices and network ------------------------------------------------------------------------------------------------


async def _vsock(config: Config) -> list[Check]:
    name = "vhost-vsock"
    if not config.machine.cid:
        return [Check(name, "ok", "not wanted (cid is 0)")]
    try:
        os.close(os.open(_VSOCK, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        denied = exc.errno in (errno.EACCES, errno.EPERM)
        hint = f"setfacl -m u:$USER:rw {_VSOCK}" if denied else "modprobe vhost_vsock"
        return [Check(name, "warn", f"{_VSOCK}: {exc.strerror}; virtio-serial carries everything", hint)]
    record = _record(config)
    if record and record.fingerprint.get("vsock") != "yes":
        detail = f"{_VSOCK} can be opened, but machine {record.name!r} was made without it"
        return [Check(name, "warn", f"{detail}; virtio-serial carries everything", _again(record))]
    return [Check(name, "ok", f"{_VSOCK} can be opened")]


async def _vhost_user(config: Config) -> list[Check]:
    """Tell whether the vsock of a daemon could be used; nobody needs it."""
    name = transports.DAEMON
    if not config.machine.vport:
        return [Check(name, "ok", "not wanted (vport is 0)")]
    try:
        program = vhost_user.find()
    except HostError as exc:
        return [Check(name, "ok", f"not there, and not needed: {exc}", exc.hint)]
    record = _record(config)
    if record and not record.machine.vport:
        return [Check(name, "warn", f"{program}, but machine {record.name!r} has no slot for it", _again(record))]
    if config.pool.revert == "loadvm" or (config.pool.revert in ("auto", "clone") and config.pool.share_memory):
        detail = f"{program}, but not for clones that share their memory, nor with --revert loadvm"
        return [Check(name, "ok", detail, f"pbotvm-qemu start --revert restart --transport {name}")]
    return [Check(name, "ok", f"{program}; --transport {name} uses it")]


async def _serial(config: Config) -> list[Check]:
    """Tell what needs nothing of the host; qemu-features says whether QEMU has the devices."""
    wanted = config.pool.transport
    used = {name: "; chosen by configuration" if wanted == name else "" for name in ("virtio-serial", "isa-serial")}
    if config.machine.serial:
        line = Check("isa-serial", "ok", f"the third serial line; slow{used['isa-serial']}")
    else:
        line = Check("isa-serial", "ok", "only for clones: there is no TCP port for it (serial is 0)")
    return [Check("virtio-serial", "ok", f"every guest has it{used['virtio-serial']}"), line]


def _record(config: Config) -> state.MachineRecord | None:
    """Return the machine that the configuration names, when there is one."""
    try:
        return state.load(config.machine.name)
    except StateError:
        return None


def _again(record: state.MachineRecord) -> str:
    return f"pbotvm-qemu create --force {record.name}"


async def _network() -> list[Check]:
    return [
        Check(item.name, "ok", item.why)
        if item.ok
        else Check(item.name, "warn", f"{item.why} (the network policy `none` does not need it)", item.hint)
        for item in await netprobe.capabilities()
    ]


# programs and rights ------------------------------------------------------------------------------------------------


async def _image_tools() -> list[Check]:
    name = "image-tools"
    tools = _IMAGE_TOOLS if os.geteuid() == 0 else _IMAGE_TOOLS | _IMAGE_TOOLS_OF_USERS
    missing = [tool for tool in tools if not _elsewhere(tool)]
    if missing:
        packages = " ".join(tools[tool] for tool in missing)
        return [Check(name, "fail", f"missing: {', '.join(missing)}", f"apt-get install {packages}")]
    return [Check(name, "ok", ", ".join(tools))]


async def _setpriv() -> list[Check]:
    path = process.find_program("setpriv", package="util-linux")
    return [Check("setpriv", "ok", f"{path} starts QEMU without rights")]


async def _privileges() -> list[Check]:
    name = "privileges"
    if os.geteuid():
        return [Check(name, "ok", f"not root: QEMU runs as user {os.geteuid()}, like us")]
    try:
        user = pwd.getpwnam(USER)
    except KeyError:
        detail = f"root: QEMU runs as `nobody`, because there is no user `{USER}`; other services may share `nobody`"
        return [Check(name, "warn", detail, f"useradd --system --no-create-home --shell /usr/sbin/nologin {USER}")]
    return [Check(name, "ok", f"root: QEMU runs as `{USER}` (user {user.pw_uid})")]


# room ---------------------------------------------------------------------------------------------------------------


async def _disk() -> list[Check]:
    free = {directory: free_space(directory) for directory in (paths.data_dir(), paths.cache_dir())}
    least = min(free.values())
    detail = ", ".join(f"{format_size(count)} free for {directory}" for directory, count in free.items())
    hint = "free some space, or point XDG_DATA_HOME and XDG_CACHE_HOME elsewhere"
    if least < image.FREE_MIN:
        return [
            Check("disk", "fail", f"{detail}; less than {format_size(image.FREE_MIN)} is too little for an image", hint)
        ]
    if least < _DISK_WARN:
        return [Check("disk", "warn", f"{detail}; {format_size(_DISK_WARN)} is comfortable", hint)]
    return [Check("disk", "ok", detail)]


def free_space(directory: Path) -> int:
    """Return the bytes that we can still write in `directory`, or where it would be made.

    Raises OSError when not even its parents can be looked at.
    """
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return shutil.disk_usage(directory).free


async def _images() -> list[Check]:
    """Compare every byte of the images in the cache with their manifests."""
    good = 0
    for id_ in sorted(image.built()):
        try:
            await asyncio.to_thread(image.Image.load(id_).verify)
        except ImageError as exc:
            return [Check("images", "fail", str(exc), exc.hint)]
        good += 1
    return [Check("images", "ok", f"{good} in {paths.images()}, every byte as built" if good else "none was built yet")]


async def _templates() -> list[Check]:
    """Compare every byte of the machines' templates with what was frozen."""
    name = "templates"
    found = [machine for machine in state.names() if template.exists(machine)]
    for machine in found:
        frozen = template.load(machine)
        await asyncio.to_thread(frozen.verify)
        frozen.check()
    detail = f"{', '.join(found)}: every byte as frozen" if found else "no machine was frozen yet"
    return [Check(name, "ok", detail)]


async def _memory(config: Config) -> list[Check]:
    available, wanted = process.memory_available(), config.machine.memory
    detail = f"{format_size(available)} available, the machine has {format_size(wanted)}"
    if available < wanted:
        return [Check("memory", "fail", detail, "use a smaller --memory, or end something")]
    if available < wanted + accel.OVERHEAD:
        return [Check("memory", "warn", f"{detail}, and QEMU needs some too", "use a smaller --memory")]
    return [Check("memory", "ok", detail)]


async def _ports(config: Config) -> list[Check]:
    wanted = {"relay": config.relay.port, "serial": config.machine.serial, "health": config.machine.health}
    used = {what: port for what, port in wanted.items() if port}
    if len(set(used.values())) < len(used):
        text = ", ".join(f"{what} {port}" for what, port in used.items())
        return [
            Check("ports", "fail", f"the same port twice: {text}", "change PBOTVM_PORT, PBOTVM_SERIAL or PBOTVM_HEALTH")
        ]
    taken = [_holder(what, port) for what, port in used.items() if not port_free(port)]
    if taken:
        detail = f"{'; '.join(taken)} (a running machine of ours holds these)"
        return [
            Check(
                "ports",
                "warn",
                detail,
                "`pbotvm-qemu list` shows what runs; or change PBOTVM_PORT, PBOTVM_SERIAL, PBOTVM_HEALTH",
            )
        ]
    text = ", ".join(f"{port} ({what})" for what, port in used.items())
    return [Check("ports", "ok", f"can be had: {text}" if used else "none is wanted")]


def port_free(port: int) -> bool:
    """Tell whether TCP `port` of the loopback address can be listened on by us."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        # As servers do: connections of an earlier run that linger do not count.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((LOOPBACK, port))
            sock.listen(1)
        except OSError:
            return False
    return True


def _holder(what: str, port: int) -> str:
    pid = process.listening_pid(port)
    if pid is None:
        return f"{what} port {port} cannot be bound, by whom held is not visible"
    try:
        command = Path(f"/proc/{pid}/comm").read_text("utf-8", "replace").strip()
    except OSError:
        command = "?"
    return f"{what} port {port} is held by pid {pid} ({command})"
