"""Other languages for a machine that exists: built and tried beside it, while it goes on serving, then put in its place.

Everything new lies in a folder `build-…` of the machine until `machine.json` names it, which is one rename. Whatever
ends us before that leaves the machine as it was; `prune` removes the folder.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import shutil
import time
from typing import TYPE_CHECKING

from pbotvm_qemu import accel, control, creation, image, paths, plan, state, trial, ways
from pbotvm_qemu.config import SNAPSHOT
from pbotvm_qemu.errors import GuestError, HostError, PbotVMError, StateError, UnknownLanguageError
from pbotvm_qemu.languages import ROWS, Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pbotvm_qemu.config import Config
    from pbotvm_qemu.languages import Language, Row

    Progress = Callable[[str, float], None]

_SWAP_WAIT = 60.0  # seconds for somebody who has the machine alone, such as `exec --revert restart`
_ASK_KEEPER = 60.0
_SWEEP_WAIT = 5.0  # seconds for programs that run in the old template; `prune` looks again later
_BUILT, _FROZEN, _TRIED = 0.5, 0.85, 0.98  # shares of the work that are done then
_HELLO: tuple[Row, ...] = ("hello",)


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """What a change of languages did."""

    record: state.MachineRecord
    added: tuple[str, ...]
    removed: tuple[str, ...]
    image: image.Image
    seconds: float  # that all of it took
    kept: bool  # whether a keeper starts its next clones from the new template
    left: tuple[Path, ...]  # what is still used of the old template; `prune` removes it afterwards
    remark: str  # what the keeper could not do, and what to type; usually empty
    late: bool  # somebody wanted to end it when it was in place already


async def add(config: Config, text: str, progress: Progress) -> Change:
    """Give machine `config.machine.name` the languages that `text` selects, beside those that it has.

    Raises UnknownLanguageError for a language that is unknown, StateError when there is nothing to add, the machine is
    being changed or kept in a way that cannot go on meanwhile, and GuestError that names the sample that failed. The
    machine is as before after any of them, and after a cancellation. One that comes when the new template is in place
    already is not followed; `late` of the answer tells of it.
    """
    registry = Registry.load(paths.user_languages())
    chosen = registry.select(text)
    for language in chosen:
        if language.absent:
            raise UnknownLanguageError(
                f"language {language.name} cannot be added: {language.absent}",
                hint=f"a file languages/{language.name}.toml of your own can name a package, see docs/languages.md",
            )
    async with state.changing(config.machine.name):
        record = state.ready(config.machine.name)
        fresh = tuple(language.name for language in chosen if language.name not in record.languages)
        if not fresh:
            raise StateError(
                f"machine {record.name!r} has {', '.join(language.name for language in chosen)} already",
                hint="`pbotvm-qemu languages` lists the others",
            )
        return await _change(config, record, registry, added=fresh, removed=(), progress=progress)


async def remove(config: Config, names: Sequence[str], progress: Progress) -> Change:
    """Take languages away from machine `config.machine.name`. Raises as `add` does."""
    registry = Registry.load(paths.user_languages())
    async with state.changing(config.machine.name):
        record = state.ready(config.machine.name)
        # A language whose file is gone can still be taken away, by its own name.
        gone = {name if name in record.languages else registry.find(name, record.languages).name for name in names}
        if not set(record.languages) - gone:
            raise StateError(
                f"machine {record.name!r} would have no language left",
                hint=f"`pbotvm-qemu rm {record.name}` removes the machine",
            )
        return await _change(config, record, registry, added=(), removed=tuple(sorted(gone)), progress=progress)


async def _change(
    config: Config,
    record: state.MachineRecord,
    registry: Registry,
    *,
    added: tuple[str, ...],
    removed: tuple[str, ...],
    progress: Progress,
) -> Change:
    begin = time.monotonic()
    await _check_possible(record)
    names = sorted({*record.languages, *added} - {*removed})
    chosen = tuple(registry.find(name) for name in names)
    state.sweep(record)  # what an attempt before this one left behind
    qemu = creation.find_qemu()
    built = await image.ensure(image.Recipe.load(chosen), lambda stage, done: progress(stage, done * _BUILT))
    progress("trying the accelerator", _BUILT)
    verdict = await accel.choose(qemu, built.kernel)
    build = f"build-{secrets.token_hex(4)}"
    home = paths.MachinePaths(record.name, build).home
    try:
        paths.private(home, mode=0o711)
        fresh = await creation.prepare(record.machine, built, qemu, verdict.name, names, build)
        sealed = await creation.freeze(fresh, built, chosen, _part(progress, _BUILT, _FROZEN))
        way = ways.Clone(plan.Plan.of(fresh, built, loadvm=None), sealed, why="to try it")
        await _try(way, chosen, added, _part(progress, _FROZEN, _TRIED))
        fresh = dataclasses.replace(fresh, state="ready", created=record.created)
        progress("putting it in place", _TRIED)
        await _swap(record, fresh)
    except BaseException as exc:
        in_place = state.files(record.name).build == build
        if not in_place:
            shutil.rmtree(home, ignore_errors=True)
        if isinstance(exc, OSError) and not in_place:
            raise HostError(f"cannot make the new template: {exc.strerror}", hint="check free space") from exc
        if not isinstance(exc, asyncio.CancelledError) or not in_place:
            raise
        late = True
    else:
        late = False
    # The machine is the new one now; whoever keeps it must not be left without knowing.
    rest = asyncio.ensure_future(_settle(fresh))
    try:
        kept, remark, left = await asyncio.shield(rest)
    except asyncio.CancelledError:
        late = True
        progress("in place already, telling who keeps it", _TRIED)
        kept, remark, left = await rest
    progress("ready", 1.0)
    return Change(fresh, added, removed, built, round(time.monotonic() - begin, 1), kept, left, remark, late)


async def _settle(fresh: state.MachineRecord) -> tuple[bool, str, tuple[Path, ...]]:
    """Do what is left when machine `fresh` is in place: tell its keeper, and delete the old template."""
    kept, remark = await _tell_keeper(fresh.name)
    return kept, remark, await _sweep(fresh)


async def _check_possible(record: state.MachineRecord) -> None:
    """Raise StateError when the change could not be carried out in the end: before minutes are spent on it."""
    kept = state.running(record.name)
    if kept and kept.purpose in ("run", "start"):
        live = await control.ask(record.name, {"do": "status"})
        if live.get("revert") != "clone":
            raise StateError(
                f"machine {record.name!r} is kept in the way {live.get('revert')}, on the disk that is to be replaced",
                hint=f"stop it with `pbotvm-qemu stop {record.name}`, or keep it with --revert clone",
            )
    tags = [str(item.get("name")) for item in await image.overlay_snapshots(state.files(record.name).disk)]
    if own := [tag for tag in tags if tag != SNAPSHOT]:
        raise StateError(
            f"machine {record.name!r} has snapshots that would be lost: {', '.join(own)}",
            hint="delete them first with `pbotvm-qemu snapshot delete`",
        )


def _part(progress: Progress, begin: float, end: float) -> Progress:
    """Return a progress function for the work that takes the share from `begin` to `end`."""
    return lambda stage, done: progress(stage, begin + (end - begin) * done)


async def _try(way: ways.Clone, chosen: Sequence[Language], added: Sequence[str], progress: Progress) -> None:
    """Run hello world of every language, and every row of those that are new, in clones of the new template."""
    for number, language in enumerate(chosen):
        progress(f"trying {language.name}", number / len(chosen))
        machine = await way.start()
        try:
            for row in ROWS if language.name in added else _HELLO:
                result = await trial.try_row(machine.execute, language, row)
                if result.verdict == "fail":
                    raise GuestError(
                        f"language {language.name} fails its sample {row!r} in the new template: {result.detail}",
                        hint="the machine is as it was; leave this language out",
                    )
        finally:
            await machine.stop()


async def _swap(old: state.MachineRecord, fresh: state.MachineRecord) -> None:
    """Have the machine be what `fresh` says. Raises StateError when it is not what `old` says any more."""
    async with state.share(old.name, wait=_SWAP_WAIT):
        if state.ready(old.name) != old:
            raise StateError(f"machine {old.name!r} was made anew meanwhile", hint="run the same command again")
        state.save(fresh)


async def _sweep(record: state.MachineRecord) -> tuple[Path, ...]:
    """Delete the old template once its last clone has ended; after a while, return what is still used of it."""
    until = time.monotonic() + _SWEEP_WAIT
    while (left := state.sweep(record)) and time.monotonic() < until:
        await asyncio.sleep(0.2)
    return tuple(left)


async def _tell_keeper(name: str) -> tuple[bool, str]:
    """Have whoever keeps the machine use the new template; tell whether he does, and else what to type."""
    kept = state.running(name)
    if kept is None or kept.purpose not in ("run", "start"):
        return False, ""
    try:
        await control.ask(name, {"do": "use-languages"}, timeout=_ASK_KEEPER)
    except PbotVMError as exc:
        if not state.running(name):
            return False, ""
        return False, f"the running machine goes on with its old languages until it is started again: {exc}"
    return True, ""
