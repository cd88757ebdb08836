"""What the command line does, as plain coroutines: they return data, print nothing and never exit."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pbotvm_qemu import accel, control, image, keeper, network_commands, paths, plan, process, snapshots, state
from pbotvm_qemu.config import SNAPSHOT, format_size
from pbotvm_qemu.errors import PbotVMError, StateError
from pbotvm_qemu.languages import Language, Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pbotvm_qemu.config import Config

_START_TIMEOUT = 180.0  # seconds for a detached keeper to report
_STOP_TIMEOUT = 45.0
_ASK_SNAPSHOT = snapshots.TIMEOUT + 60.0


# keepers -----------------------------------------------------------------------------------------------------------------


async def keep(
    config: Config, load: Callable[[], Config], *, relay: bool, purpose: str, on_ready: Callable[[str], None]
) -> None:
    """Keep machine `config.machine.name` until told to stop; see Keeper.keep. `load` reads the configuration again."""
    record = state.ready(config.machine.name)
    await keeper.Keeper(record, config, load, purpose=purpose, relay=relay).keep(on_ready)


async def start(config: Config, *, relay: bool, arguments: Sequence[str]) -> state.ProcessRecord:
    """Start a keeper in the background and return who keeps the machine once it is ready.

    `arguments` are the command line of the keeper, after the program. Raises StateError with the end of its log when
    it does not get ready.
    """
    name = state.ready(config.machine.name).name
    if kept := state.running(name):
        raise StateError(
            f"machine {name!r} runs already (pid {kept.keeper.pid})", hint=f"stop it with `pbotvm-qemu stop {name}`"
        )
    files = paths.MachinePaths(name)
    with files.keeper_log.open("ab") as stream:
        begin = stream.tell()
        child = process.Detached([sys.executable, "-m", "pbotvm_qemu", *arguments], log=stream.fileno())
    until = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < until and child.status is None:
        kept = state.running(name)
        if kept and kept.keeper.pid == child.pid and files.control_socket.exists() and bool(kept.relay) == relay:
            return kept
        await child.wait(0.05)
    said = files.keeper_log.read_bytes()[begin:].decode("utf-8", "replace").strip().splitlines()
    if child.status is None:
        await child.end(process.TERMINATE, _STOP_TIMEOUT)
    cause = next((line.removeprefix("error: ") for line in said if line.startswith("error: ")), "it gave no reason")
    hint = next((line.removeprefix("hint: ") for line in said if line.startswith("hint: ")), f"see {files.keeper_log}")
    raise StateError(f"machine {name!r} did not start: {cause}", hint=hint)


async def stop(name: str) -> bool:
    """Stop machine `name`; tell whether it ran. Programs under way get a while to end.

    Raises StateError when it does not stop.
    """
    state.load(name)
    kept = state.running(name)
    if kept is None:
        return False
    if kept.purpose not in ("run", "start"):
        raise StateError(
            f"machine {name!r} is used by `pbotvm-qemu {kept.purpose}` (pid {kept.keeper.pid})",
            hint="wait for it, or interrupt it with Ctrl-C",
        )
    with contextlib.suppress(PbotVMError):
        await control.ask(name, {"do": "stop"})
    until = time.monotonic() + _STOP_TIMEOUT
    while time.monotonic() < until:
        if not kept.keeper.alive():
            return True
        await asyncio.sleep(0.02)
    raise StateError(f"machine {name!r} did not stop in {_STOP_TIMEOUT:.0f} s", hint=f"kill -9 {kept.keeper.pid}")


# reports -----------------------------------------------------------------------------------------------------------------


def summary(name: str) -> dict[str, object]:
    """Return what `list` shows of machine `name`; a damaged one is shown as such."""
    try:
        record = state.load(name)
    except StateError as exc:
        return {"name": name, "state": "damaged", "problem": str(exc)}
    kept = state.running(name)
    shown = (
        record.state if kept is None else "running" if kept.purpose in ("run", "start") else f"in use by {kept.purpose}"
    )
    return {
        "name": name,
        "state": shown,
        "pid": kept.keeper.pid if kept else None,
        "memory": record.machine.memory,
        "cpus": record.machine.cpus,
        "disk_size": record.machine.disk_size,
        "net": record.machine.net,
        "serial": record.machine.serial,
        "health": record.machine.health,
        "accelerator": record.accelerator,
        "languages": list(record.languages),
        **_image_figures(record.image),
        "created": record.created,
    }


def _image_figures(id_: str) -> dict[str, object]:
    """Return size in bytes and build time in seconds of an image, None for what is not known."""
    try:
        found = image.Image.load(id_)
    except PbotVMError:
        return {"image_bytes": None, "image_build_s": None}
    return {"image_bytes": found.size, "image_build_s": found.build_s}


def image_text(built: image.Image) -> str:
    """Return size and build time of an image in words."""
    took = "" if built.build_s is None else f", built in {built.build_s:.0f} s"
    return f"the image has {format_size(built.size)}{took}"


async def status(keeper_config: Config) -> dict[str, object]:
    """Return everything that is known about machine `keeper_config.machine.name`. Raises StateError when there is none."""
    name = keeper_config.machine.name
    record = state.load(name)
    files = state.files(name)
    report = summary(name) | {
        "image": record.image,
        "qemu": record.qemu,
        "directory": str(files.directory),
        "disk_bytes": files.disk.stat().st_blocks * 512 if files.disk.exists() else 0,
        "verdict": accelerator_reason(record),
    }
    if report["state"] == "running":
        live = await control.ask(name, {"do": "status"})
        report["live"] = live
        pids = live.get("pids")
        used = [process.usage(pid) for pid in pids if isinstance(pid, int)] if isinstance(pids, list) else []
        report["qemu_usage"] = [asdict(item) for item in used if item]
    else:
        report["revert"], report["revert_why"] = _way_back(record, keeper_config)
    return report


def _way_back(record: state.MachineRecord, config: Config) -> tuple[str | None, str]:
    """Return the way back to clean that runs of a machine have, and why; or None and why there is none."""
    try:
        way = keeper.choose(record, config)
    except PbotVMError as exc:
        return None, str(exc)
    return way.name, way.why


def accelerator_reason(record: state.MachineRecord) -> str:
    """Return why the machine has the accelerator that it has."""
    verdict = accel.cached(record.qemu)
    if verdict and verdict.name == record.accelerator:
        return verdict.reason
    return f"made with {record.accelerator}; `pbotvm-qemu doctor` says what this host can do today"


def qemu_command(config: Config) -> str:
    """Return the command line of machine `config.machine.name`, as one would type it."""
    return plan.command_text(keeper.choose(state.ready(config.machine.name), config).plan)


def log_files(name: str) -> list[Path]:
    """Return the logs that machine `name` has."""
    state.load(name)
    files = paths.MachinePaths(name)
    return [file for file in (files.keeper_log, files.qemu_log, files.console_log) if file.exists()]


def languages(name: str | None) -> list[dict[str, object]]:
    """Return every known language, and whether machine `name` has it (None: there is no such machine)."""
    installed: Sequence[str] | None = None
    if name is not None:
        with contextlib.suppress(StateError):
            installed = state.load(name).languages
    return [
        {
            "name": language.name,
            "aliases": list(language.aliases),
            "description": language.description,
            "installed": installed is not None and language.name in installed,
            "why": _why_not(language, name, installed),
        }
        for _name, language in sorted(Registry.load(paths.user_languages()).languages.items())
    ]


def _why_not(language: Language, name: str | None, installed: Sequence[str] | None) -> str:
    if installed is not None and language.name in installed:
        return ""
    if language.absent:
        return language.absent
    if installed is None:
        return f"there is no machine {name!r} yet" if name else "no machine was named"
    return f"machine {name!r} is without it; `pbotvm-qemu languages add {language.name}` adds it"


def language(name: str) -> dict[str, object]:
    """Return all that is known of the language called `name`. Raises UnknownLanguageError when there is none."""
    found = asdict(Registry.load(paths.user_languages()).find(name))
    found["tests"] = {
        **found["tests"]["programs"],
        **{row: f"none: {why}" for row, why in found["tests"]["cannot"].items()},
    }
    return found


def installed_languages(name: str, text: str) -> tuple[Language, ...]:
    """Return those of machine `name`'s languages that `text` selects, all when it is empty.

    Raises UnknownLanguageError for one that the machine does not have, StateError when there is no machine.
    """
    record = state.ready(name)
    registry = Registry.load(paths.user_languages())
    chosen = registry.select(text or ",".join(record.languages))
    return tuple(registry.find(item.name, record.languages, machine=name) for item in chosen)


# snapshots ---------------------------------------------------------------------------------------------------------------


async def _with_own_disk(name: str) -> bool:
    """Tell whether machine `name` is kept by a QEMU that has its disk open."""
    kept = state.running(name)
    if kept is None or kept.purpose not in ("run", "start"):
        return False
    return (await control.ask(name, {"do": "status"})).get("revert") != "clone"


async def snapshot_list(name: str) -> list[dict[str, object]]:
    """Return the snapshots of machine `name`, running or not, as QEMU's SnapshotInfo objects."""
    state.ready(name)
    if await _with_own_disk(name):
        found = (await control.ask(name, {"do": "snapshot-list"}))["snapshots"]
        return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
    return await image.overlay_snapshots(state.files(name).disk)


async def snapshot_create(name: str, tag: str) -> None:
    """Save the state of the running machine `name` under `tag`."""
    state.ready(name)
    await control.ask(name, {"do": "snapshot-create", "tag": keeper.check_tag(tag)}, timeout=_ASK_SNAPSHOT)


async def snapshot_delete(name: str, tag: str) -> None:
    """Delete snapshot `tag` of machine `name`, running or not."""
    state.ready(name)
    keeper.check_tag(tag)
    if await _with_own_disk(name):
        await control.ask(name, {"do": "snapshot-delete", "tag": tag}, timeout=_ASK_SNAPSHOT)
        return
    async with state.lock(name, purpose="snapshot"):
        disk = state.files(name).disk
        tags = [str(item.get("name")) for item in await image.overlay_snapshots(disk)]
        if tag == SNAPSHOT:
            raise StateError(
                f"snapshot {tag!r} is the one that runs start from", hint="make the machine anew with `create --force`"
            )
        if tag not in tags:
            raise StateError(f"there is no snapshot {tag!r} (there are: {', '.join(tags)})", hint="see `snapshot list`")
        await image.delete_overlay_snapshot(disk, tag)


async def revert(name: str, tag: str) -> str:
    """Put the running machine `name` back to `tag`; return the way taken, "loadvm" or "restart"."""
    state.ready(name)
    return str((await control.ask(name, {"do": "revert", "tag": keeper.check_tag(tag)}, timeout=_ASK_SNAPSHOT))["way"])


# removal -----------------------------------------------------------------------------------------------------------------


async def remove(name: str, *, force: bool) -> None:
    """Delete machine `name`. Raises StateError when it runs and `force` is not given."""
    if not paths.MachinePaths(name).directory.exists():
        state.load(name)
    async with state.changing(name):
        await _remove(name, force=force)
    state.forget_lock(name)


async def _remove(name: str, *, force: bool) -> None:
    kept = state.running(name)
    if kept and not force:
        raise StateError(
            f"machine {name!r} is running (pid {kept.keeper.pid})",
            hint=f"stop it with `pbotvm-qemu stop {name}`, or use --force",
        )
    if kept and kept.purpose in ("run", "start"):
        with contextlib.suppress(StateError):
            await stop(name)
    if kept and kept.keeper.alive():
        kept.keeper.kill()
    async with state.lock(name, purpose="rm", wait=10.0):
        state.discard(name)


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that a crash left behind."""

    kind: str  # "process", "machine", "image build", "image", "network", "runtime folder"
    what: str


async def prune(*, dry_run: bool, images: bool) -> list[Leftover]:
    """Find what crashes left behind, remove it unless `dry_run`, and return it.

    With `images`, images that no machine uses count too.
    """
    found: list[Leftover] = []
    for name in _known_names():
        found += await _prune_machine(name, dry_run=dry_run)
    for folder in image.unfinished_builds():
        found.append(Leftover("image build", str(folder)))
        if not dry_run:
            shutil.rmtree(folder, ignore_errors=True)
    found += [Leftover("network", what) for what in await network_commands.prune(dry_run=dry_run)]
    if images and not state.in_transition():
        used = {state.load(name).image for name in state.names() if summary(name)["state"] != "damaged"}
        for id_ in sorted(image.built() - used):
            found.append(Leftover("image", str(paths.images() / id_)))
            if not dry_run:
                shutil.rmtree(paths.images() / id_, ignore_errors=True)
    return found


def _known_names() -> list[str]:
    folder = paths.runtime_dir() / "machines"
    live = {entry.name for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else set()
    return sorted(live | set(state.names()))


async def _prune_machine(name: str, *, dry_run: bool) -> list[Leftover]:
    found = await _prune_languages(name, dry_run=dry_run)
    return found if state.running(name) else found + await _prune_crash(name, dry_run=dry_run)


async def _prune_languages(name: str, *, dry_run: bool) -> list[Leftover]:
    """Find and remove what a change of languages replaced or did not finish, also under a machine that is kept."""
    try:
        record = state.ready(name)
        async with state.changing(name):
            stale = state.replaced(record)
            left = [] if dry_run else state.sweep(record)
    except StateError:  # unfinished, damaged, or being changed just now
        return []
    return [Leftover("template", f"{file}, which is not in use any more") for file in stale if file not in left]


async def _prune_crash(name: str, *, dry_run: bool) -> list[Leftover]:
    found: list[Leftover] = []
    files = state.files(name)
    if left := state.get_process(name):
        found.append(Leftover("record", f"{files.process_record} of process {left.keeper.pid}, which is gone"))
    if lost := [qemu.pid for qemu in state.orphans(name)] if not state.held(name) else []:
        found += [Leftover("process", f"QEMU {pid} of machine {name}") for pid in lost]
    if not state.held(name):
        found += [Leftover("sockets", str(folder)) for folder in state.sockets(name)]
    gone = not files.directory.exists()
    unfinished = not gone and summary(name)["state"] == "creating"
    if unfinished:
        found.append(Leftover("machine", f"{files.directory}, which was never finished"))
    if gone and not left:
        found.append(Leftover("runtime folder", str(files.runtime)))
    if found and not dry_run:
        try:
            async with state.lock(name, purpose="prune"):  # which kills the orphan and clears the record
                if unfinished:
                    state.discard(name)
                elif left and left.purpose != "create" and files.disk.exists():
                    await image.repair_overlay(files.disk)
        except StateError:  # somebody began to use it just now
            return []
        if gone or unfinished:
            state.forget_lock(name)
    return found
