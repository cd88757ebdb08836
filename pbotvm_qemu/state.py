"""What outlives a process: records of machines, who runs them, and locks. Atomic writes; a pid alone is no identity."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pbotvm_qemu import config, paths, process
from pbotvm_qemu.errors import ConfigError, StateError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

_VERSION = 1
_BUILD = re.compile(r"(build-[0-9a-f]{8})?")
_POLL = 0.05  # seconds between two looks at a lock: flock has no deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRecord:
    """What `create` decided about a machine, and what its snapshot was made with."""

    name: str
    uuid: str
    created: int  # seconds since the epoch
    state: Literal["creating", "ready"]
    machine: config.MachineConfig
    image: str
    languages: tuple[str, ...]
    accelerator: Literal["kvm", "tcg"]
    qemu: str  # path of the QEMU program
    fingerprint: dict[str, str]  # what must be the same for the snapshot to be used, by name
    build: str = ""  # folder of disk and template in the machine's own; empty: that itself


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """Who runs a machine now."""

    keeper: process.Identity
    purpose: str  # "run", "start", "exec" or "create"
    relay: str  # HOST:PORT that PBot clients reach, or empty


def write_atomic(file: Path, text: str, *, mode: int = 0o600) -> None:
    """Replace the content of `file`; whoever reads it sees the old text or the new one, also after a crash."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(fd, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise StateError(
            f"cannot write {file}: {exc.strerror}", hint="check its folder's owner and free space"
        ) from exc


def save(record: MachineRecord) -> None:
    """Store `record`. Raises StateError when it cannot be written."""
    write_atomic(paths.MachinePaths(record.name).record, json.dumps({"version": _VERSION, **asdict(record)}, indent=1))


def load(name: str) -> MachineRecord:
    """Return the record of machine `name`.

    Raises StateError when there is none, or it is damaged or of a later version.
    """
    file = paths.MachinePaths(config.machine_name(name)).record
    try:
        table = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        known = ", ".join(names()) or "none yet"
        raise StateError(
            f"there is no machine {name!r} (there are: {known})", hint=f"make it with `pbotvm-qemu create {name}`"
        ) from None
    except (OSError, ValueError, RecursionError) as exc:
        raise StateError(
            f"{file} is damaged: {str(exc)[:200]}", hint=f"run `pbotvm-qemu create --force {name}`"
        ) from exc
    return _parse(table, file, name)


def _parse(table: object, file: Path, name: str) -> MachineRecord:
    again = f"run `pbotvm-qemu create --force {name}`"
    try:
        assert isinstance(table, dict)
        if table["version"] != _VERSION:
            raise StateError(f"{file} is of version {table['version']}, this program reads {_VERSION}", hint=again)
        machine = config.checked(config.MachineConfig(), "machine", dict(table["machine"]), str(file))
        if table["state"] not in ("creating", "ready") or table["accelerator"] not in ("kvm", "tcg"):
            raise StateError(f"{file} is damaged: unknown state or accelerator", hint=again)
        if machine.name != name:
            raise StateError(f"{file} belongs to machine {machine.name!r}", hint=again)
        build = str(table.get("build", ""))
        if not _BUILD.fullmatch(build):
            raise StateError(f"{file} is damaged: unknown build {build[:40]!r}", hint=again)
        return MachineRecord(
            name=name,
            build=build,
            uuid=str(table["uuid"]),
            created=int(table["created"]),
            state=table["state"],
            machine=machine,
            image=str(table["image"]),
            languages=tuple(map(str, table["languages"])),
            accelerator=table["accelerator"],
            qemu=str(table["qemu"]),
            fingerprint={str(key): str(value) for key, value in table["fingerprint"].items()},
        )
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError, ConfigError) as exc:
        raise StateError(f"{file} is damaged: {type(exc).__name__}: {exc}", hint=again) from exc


def files(name: str) -> paths.MachinePaths:
    """Return the files of machine `name` that are in use now; those of a new one when it has no readable record."""
    with contextlib.suppress(StateError):
        return paths.MachinePaths(name, load(name).build)
    return paths.MachinePaths(name)


def replaced(record: MachineRecord) -> list[Path]:
    """Return the files and folders of machine `record` that a change of languages replaced, or never finished."""
    directory = paths.MachinePaths(record.name).directory
    found = [folder for folder in sorted(directory.glob("build-*")) if folder.name != record.build]
    if record.build:
        first = paths.MachinePaths(record.name)
        found += [file for file in (first.template, first.disk, first.initramfs) if file.exists()]
    return found


def sweep(record: MachineRecord) -> list[Path]:
    """Delete what `replaced` returns, and return what is still used and so was left.

    The caller holds the machine by `changing`.
    """
    left = []
    for file in replaced(record):
        template = file / "template" if file.name.startswith("build-") else file
        fd = _lock_folder(template) if template.is_dir() else None
        if fd is None and template.is_dir():
            left.append(file)
            continue
        shutil.rmtree(file, ignore_errors=True) if file.is_dir() else file.unlink(missing_ok=True)
        if fd is not None:
            os.close(fd)
    return left


def _lock_folder(folder: Path) -> int | None:
    """Return a descriptor that holds `folder` alone, or None when somebody uses it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def names() -> list[str]:
    """Return the names of all machines, finished or not."""
    folder = paths.data_dir() / "machines"
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def ready(name: str) -> MachineRecord:
    """Return the record of a machine that `create` has finished. Raises StateError otherwise."""
    record = load(name)
    if record.state != "ready":
        raise StateError(f"machine {name!r} was never finished", hint=f"run `pbotvm-qemu create {name}` again")
    return record


def discard(name: str) -> None:
    """Delete everything about machine `name` but its process record. The caller holds its lock."""
    machine = paths.MachinePaths(config.machine_name(name))
    shutil.rmtree(machine.directory, ignore_errors=True)
    shutil.rmtree(machine.console_socket.parent, ignore_errors=True)


def forget_lock(name: str) -> None:
    """Delete the runtime files of a machine that is gone."""
    machine = paths.MachinePaths(config.machine_name(name))
    shutil.rmtree(machine.runtime, ignore_errors=True)
    machine.keeper_lock.unlink(missing_ok=True)
    machine.change_lock.unlink(missing_ok=True)
    machine.lock.unlink(missing_ok=True)


def set_process(name: str, record: ProcessRecord) -> None:
    """Say who runs machine `name` now."""
    write_atomic(paths.MachinePaths(name).process_record, json.dumps(asdict(record)))


def clear_process(name: str) -> None:
    """Say that nobody runs machine `name` any more."""
    machine = paths.MachinePaths(name)
    for file in (machine.process_record, machine.control_socket, machine.console_socket):
        file.unlink(missing_ok=True)


def get_process(name: str) -> ProcessRecord | None:
    """Return who runs, or ran until a crash, machine `name`; None when it was ended in order."""
    try:
        table = json.loads(paths.MachinePaths(name).process_record.read_text("utf-8"))
        return ProcessRecord(
            keeper=process.Identity(int(table["keeper"]["pid"]), float(table["keeper"]["started"])),
            purpose=str(table["purpose"]),
            relay=str(table["relay"]),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def running(name: str) -> ProcessRecord | None:
    """Return who runs machine `name` now, or None."""
    record = get_process(name)
    return record if record and record.keeper.alive() else None


@contextlib.asynccontextmanager
async def lock(
    name: str, *, purpose: str, wait: float = 0.0, on_wait: Callable[[str], None] | None = None
) -> AsyncIterator[None]:
    """Hold machine `name` alone while the body runs, and say so in its process record.

    Waits up to `wait` seconds for whoever has it. Raises StateError that names the holder after that. A QEMU that a
    killed holder left behind is killed first.
    """
    machine = paths.MachinePaths(config.machine_name(name))
    async with _held(machine.lock, name, wait=wait, on_wait=on_wait):
        paths.private(machine.runtime, mode=0o711)
        end_orphans(name)
        with _recorded(name, purpose):
            yield


@contextlib.asynccontextmanager
async def share(name: str, *, wait: float = 0.0, on_wait: Callable[[str], None] | None = None) -> AsyncIterator[None]:
    """Hold machine `name` together with others while the body runs: enough for whoever only clones it.

    Waits up to `wait` seconds for somebody who has it alone. Raises StateError that names him after that.
    """
    machine = paths.MachinePaths(config.machine_name(name))
    async with _held(machine.lock, name, shared=True, wait=wait, on_wait=on_wait):
        yield


@contextlib.asynccontextmanager
async def changing(name: str) -> AsyncIterator[None]:
    """Be the one process that makes, changes or removes machine `name`, while others may go on using it.

    Raises StateError that names who does so already.
    """
    machine = paths.MachinePaths(config.machine_name(name))
    for folder in (paths.runtime_dir(), machine.change_lock.parent):
        paths.private(folder, mode=0o711)
    fd = _try_lock(machine.change_lock, shared=False)
    if fd is None:
        raise StateError(
            f"machine {name!r} is being changed by {_lock_owner(machine.change_lock)}",
            hint="wait for its end, or interrupt it",
        )
    try:
        yield
    finally:
        os.close(fd)


def in_transition() -> bool:
    """Tell whether a machine is being made or changed, or still uses what was replaced: images that no record names."""
    if any(_taken(file) for file in (paths.runtime_dir() / "machines").glob("*.change.lock")):
        return True
    for name in names():
        with contextlib.suppress(StateError):
            if replaced(load(name)):
                return True
    return False


@contextlib.asynccontextmanager
async def keep(name: str, *, purpose: str, alone: bool) -> AsyncIterator[None]:
    """Be the one keeper of machine `name` while the body runs, and say so in its process record.

    `alone` for a keeper that uses the machine's own disk. Raises StateError that names who is in the way.
    """
    machine = paths.MachinePaths(config.machine_name(name))
    async with (
        _held(machine.keeper_lock, name),
        _held(machine.lock, name, shared=not alone),
    ):
        paths.private(machine.runtime, mode=0o711)
        if alone:
            end_orphans(name)
        with _recorded(name, purpose):
            yield


@contextlib.contextmanager
def _recorded(name: str, purpose: str) -> Iterator[None]:
    """Say who runs machine `name` while the body runs."""
    me = process.Identity.of(os.getpid())
    assert me
    set_process(name, ProcessRecord(me, purpose, ""))
    try:
        yield
    finally:
        clear_process(name)


@contextlib.asynccontextmanager
async def _held(
    file: Path,
    name: str,
    *,
    shared: bool = False,
    wait: float = 0.0,
    on_wait: Callable[[str], None] | None = None,
) -> AsyncIterator[None]:
    for folder in (paths.runtime_dir(), file.parent):
        paths.private(folder, mode=0o711)
    fd = await _acquire(file, name, wait, on_wait, shared=shared)
    try:
        yield
    finally:
        os.close(fd)


async def _acquire(file: Path, name: str, wait: float, on_wait: Callable[[str], None] | None, *, shared: bool) -> int:
    """Return a descriptor that holds the lock on `file`."""
    until = time.monotonic() + wait
    told = False
    while True:
        fd = _try_lock(file, shared=shared)
        if fd is not None:
            return fd
        who = _holder(file, name)
        if time.monotonic() >= until:
            raise StateError(
                f"machine {name!r} is in use by {who}", hint="try again later, or stop it with `pbotvm-qemu stop`"
            )
        if on_wait and not told:
            told = True
            on_wait(f"waiting for {who}, which uses machine {name!r}")
        await asyncio.sleep(_POLL)


def _holder(file: Path, name: str) -> str:
    """Return in words who holds the lock on `file`."""
    if holder := running(name):
        return f"`pbotvm-qemu {holder.purpose}` (pid {holder.keeper.pid})"
    return _lock_owner(file)


def _lock_owner(file: Path) -> str:
    """Return in words which process holds the lock on `file`."""
    with contextlib.suppress(OSError):
        inode = str(file.stat().st_ino)
        for line in Path("/proc/locks").read_text("ascii").splitlines():  # proc_locks(5)
            words = line.split()
            if len(words) > 5 and words[1] == "FLOCK" and words[5].rpartition(":")[2] == inode:
                return f"process {words[4]}"
    return "another process"


def _try_lock(file: Path, *, shared: bool) -> int | None:
    """Return a descriptor that holds the lock on `file`, or None when somebody else has it."""
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        if os.fstat(fd).st_ino == file.stat().st_ino:  # else `rm` deleted it while we waited: ours is nobody's lock
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def orphans(name: str) -> list[process.Identity]:
    """Return every QEMU of machine `name` that runs. Without a holder of the machine, those that a crash left."""
    with contextlib.suppress(StateError):
        return process.with_words("-uuid", load(name).uuid)
    return []


def held(name: str) -> bool:
    """Tell whether anybody has machine `name`, alone or with others."""
    return _taken(paths.MachinePaths(name).lock)


def _taken(file: Path) -> bool:
    """Tell whether anybody holds the lock on `file`."""
    try:
        fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def end_orphans(name: str) -> None:
    """Kill the QEMUs of holders that are gone. The caller holds the lock alone."""
    for orphan in orphans(name):
        orphan.kill()
    for folder in sockets(name):
        shutil.rmtree(folder, ignore_errors=True)


def sockets(name: str) -> list[Path]:
    """Return the folders in which vsock daemons of machine `name` listen, or listened."""
    return sorted(paths.MachinePaths(name).runtime.glob(paths.DAEMON_FOLDERS))
