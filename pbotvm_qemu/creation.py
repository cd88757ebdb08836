"""Making a machine: image, disk, cold boot, warm-up, template, clean snapshot."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING

from pbotvm_qemu import accel, image, machine, net, paths, plan, process, snapshots, state, template, trial
from pbotvm_qemu.config import SNAPSHOT
from pbotvm_qemu.errors import HostError, StateError
from pbotvm_qemu.languages import Language, Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pbotvm_qemu.config import Config, MachineConfig

    Progress = Callable[[str, float], None]

log = logging.getLogger(__name__)

_SNAPSHOT_ROOM = 256 << 20  # bytes of disk beside the guest's memory, which is written twice


def find_qemu() -> str:
    """Return the path of QEMU. Raises HostError when it is not installed."""
    return process.find_program("qemu-system-x86_64", package="qemu-system-x86")


async def create(config: Config, languages: str, progress: Progress, *, force: bool = False) -> state.MachineRecord:
    """Make machine `config.machine.name` up to its clean snapshot, and return its record.

    Raises StateError when it exists and `force` is not given; what was half made is gone after an error or Ctrl-C.
    """
    name = config.machine.name
    chosen = Registry.load(paths.user_languages()).select(languages)
    qemu = find_qemu()
    async with state.changing(name), state.lock(name, purpose="create"):
        if _exists(name) and not force:
            raise StateError(
                f"machine {name!r} exists already",
                hint=f"use it, or make it anew with `pbotvm-qemu create --force {name}`",
            )
        try:
            return await _create(config, chosen, qemu, progress)
        except BaseException:
            if not paths.MachinePaths(name).directory.exists():
                state.forget_lock(name)
            raise


async def _create(config: Config, chosen: Sequence[Language], qemu: str, progress: Progress) -> state.MachineRecord:
    built = await image.ensure(image.Recipe.load(chosen), lambda stage, done: progress(stage, done * 0.7))
    progress("trying the accelerator", 0.7)
    verdict = await accel.choose(qemu, built.kernel)
    log.info("accelerator: %s (%s)", verdict.name, verdict.reason)
    return await make(config, built, qemu, verdict.name, chosen, progress)


async def make(
    config: Config,
    built: image.Image,
    qemu: str,
    accelerator: accel.Name,
    chosen: Sequence[Language],
    progress: Progress,
) -> state.MachineRecord:
    """Make a machine from a finished image; the caller holds its lock. Nothing is left of it after an error."""
    name = config.machine.name
    files = paths.MachinePaths(name)
    paths.private(paths.data_dir(), mode=0o711)
    paths.private(files.directory.parent, mode=0o711)
    state.discard(name)
    paths.private(files.directory, mode=0o711)
    try:
        record = await prepare(_with_free_ports(config), built, qemu, accelerator, [item.name for item in chosen])
        state.save(record)
        await freeze(record, built, chosen, progress)
        record = replace(record, state="ready")
        state.save(record)
    except BaseException:
        state.discard(name)
        raise
    progress("ready", 1.0)
    return record


def _exists(name: str) -> bool:
    try:
        return state.load(name).state == "ready"
    except StateError:
        return paths.MachinePaths(name).record.exists()  # damaged: only --force may touch it


async def prepare(
    hardware: MachineConfig,
    built: image.Image,
    qemu: str,
    accelerator: accel.Name,
    languages: Sequence[str],
    build: str = "",
) -> state.MachineRecord:
    """Write the initramfs of a machine that is to be frozen, and return its first record.

    Raises HostError when there is no room for the rest.
    """
    files = paths.MachinePaths(hardware.name, build)
    need = 2 * hardware.memory + _SNAPSHOT_ROOM
    free = shutil.disk_usage(files.home).free
    if free < need:
        raise HostError(
            f"{files.home} has {free >> 20} MiB of free space, the snapshot needs up to {need >> 20} MiB",
            hint="free some space, use less --memory, or set XDG_DATA_HOME to a larger disk",
        )
    digest = image.write_initramfs(built, files.initramfs)
    vsock = bool(hardware.cid and hardware.vport) and plan.has_vsock()
    vhost = net.imagined(hardware.net, hardware.cpus) > 0 and net.has_vhost()
    return state.MachineRecord(
        name=hardware.name,
        build=build,
        uuid=str(uuid.uuid4()),
        created=int(time.time()),
        state="creating",
        machine=hardware,
        image=built.id,
        languages=tuple(languages),
        accelerator=accelerator,
        qemu=qemu,
        fingerprint=plan.fingerprint(hardware, built, qemu, accelerator, digest, vsock=vsock, vhost=vhost),
    )


def _with_free_ports(config: Config) -> MachineConfig:
    """Return the hardware with serial ports that no other machine of ours has, unless the caller chose them."""
    taken: set[int] = set()
    for other in state.names():
        with contextlib.suppress(StateError):
            if other != config.machine.name:
                found = state.load(other).machine
                taken |= {found.serial, found.health}
    serial, health = config.machine.serial, config.machine.health
    while not {"serial", "health"} & config.explicit and serial and {serial, health} & taken:
        serial, health = serial + 2, health + 2
    return replace(config.machine, serial=serial, health=health)


async def freeze(
    record: state.MachineRecord, built: image.Image, languages: Sequence[Language], progress: Progress
) -> template.Template:
    """Boot the machine, warm up every language, freeze it as a template, and take the clean snapshot from a clone.

    Raises GuestError that names the language whose sample fails, and what VirtualMachine raises.
    """
    files = paths.MachinePaths(record.name, record.build)
    hardware = record.machine
    progress("booting the guest", 0.72)
    ram = template.prepare(files.template, hardware.memory)
    disk = files.template / "disk.qcow2"
    await image.create_overlay(built, disk, hardware.disk_size)
    cold = plan.Plan.of(record, built, loadvm=None)
    if record.build:  # the machine that it is to replace has the ports and the console
        cold = replace(cold, config=replace(hardware, serial=0, health=0), console=None)
    async with machine.VirtualMachine(replace(cold, disk=disk, memory=plan.Memory(ram, shared=True))) as vm:
        for number, language in enumerate(languages):
            progress(f"warming up {language.name}", 0.82 + 0.1 * number / len(languages))
            await trial.warm(vm.execute, language)
        progress("freezing the machine", 0.92)
        # Twice: the first answer may still have its own traces under way in the guest.
        await vm.channel.ping()
        await vm.channel.ping()
        version = vm.monitor.version
        with (files.template / "state").open("xb") as stream:
            await vm.freeze(stream.fileno())
    sealed = await template.seal(files.template, record.fingerprint, disk_size=hardware.disk_size, qemu_version=version)
    progress("taking the snapshot", 0.95)
    shutil.copy(files.template / "overlay.qcow2", files.disk)
    files.disk.chmod(0o600)
    clone = replace(cold.restored(sealed.memory), disk=files.disk)
    async with machine.VirtualMachine(clone, thaw=sealed.frozen) as vm:  # which also shows that the template works
        await vm.channel.ping()
        await vm.monitor.snapshot_save(SNAPSHOT, plan.DISK, timeout=snapshots.TIMEOUT)
    return sealed
