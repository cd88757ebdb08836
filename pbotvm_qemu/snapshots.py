"""Snapshots in the disk of a machine that is kept in the way `restart` or `loadvm`: QEMU's own, by tag."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pbotvm_qemu.config import SNAPSHOT
from pbotvm_qemu.errors import GuestError, MonitorError, StateError
from pbotvm_qemu.machine import RESTORE_TIMEOUT
from pbotvm_qemu.plan import DISK
from pbotvm_qemu.ways import Restart

if TYPE_CHECKING:
    from pbotvm_qemu.pool import Pool

log = logging.getLogger(__name__)

TIMEOUT = 120.0  # seconds to write a machine's memory


async def found(pool: Pool) -> list[dict[str, object]]:
    """Return the snapshots of the machine as QEMU's SnapshotInfo objects."""
    _own_disk(pool)
    async with pool.lease() as lease:
        lease.clean = True
        return await lease.machine.monitor.snapshots(DISK)


async def create(pool: Pool, tag: str) -> None:
    """Save the machine as it stands now under a new tag. Raises StateError when the tag is taken."""
    _own_disk(pool)
    async with pool.lease() as lease:
        lease.clean = True
        monitor = lease.machine.monitor
        if tag in _tags(await monitor.snapshots(DISK)):
            raise StateError(f"there is a snapshot {tag!r} already", hint="delete it first, or use another tag")
        await monitor.snapshot_save(tag, DISK, timeout=TIMEOUT)


async def delete(pool: Pool, tag: str) -> None:
    """Delete a snapshot. Raises StateError when there is none, or the machine starts from it."""
    way = _own_disk(pool)
    async with pool.lease() as lease:
        lease.clean = True
        if tag in (way.plan.loadvm, SNAPSHOT):
            raise StateError(f"snapshot {tag!r} is the one that runs start from", hint="revert to another one first")
        _require(tag, await lease.machine.monitor.snapshots(DISK))
        await lease.machine.monitor.snapshot_delete(tag, DISK, timeout=TIMEOUT)


async def revert(pool: Pool, tag: str) -> str:
    """Put the machine back to snapshot `tag`, which later runs start from too; return the way that was taken.

    In the running process when that works ("loadvm"), else by a new process ("restart"); for clones, which can go back
    to the clean snapshot only, by new clones ("clone"). Raises StateError when there is no such snapshot, MonitorError
    when QEMU refuses; the machine is then as before.
    """
    if tag == SNAPSHOT and not isinstance(pool.way, Restart):
        pool.replace_ready()
        return pool.way.name
    way = _own_disk(pool)
    async with pool.lease() as lease:
        lease.clean = True
        _require(tag, await lease.machine.monitor.snapshots(DISK))
        try:
            await lease.machine.revert(tag, timeout=RESTORE_TIMEOUT[way.plan.accelerator] / 4)
            lease.warm.clear()
        except GuestError as exc:
            # Under emulation a load in process does not rewind the guest's clock, and some guests then hang.
            log.warning("the agent was silent after snapshot-load (%s); starting a new process", exc)
            lease.clean = False
        except MonitorError:
            lease.clean = False
            raise
        way.use(tag)
        return "loadvm" if lease.clean else "restart"


def _own_disk(pool: Pool) -> Restart:
    if isinstance(pool.way, Restart):
        return pool.way
    raise StateError(
        "this machine is kept as clones, which have no disk to hold snapshots",
        hint="stop it, and start it with --revert restart; to save a clone while it lives, see `pbotvm-qemu session`",
    )


def _tags(snapshots: list[dict[str, object]]) -> list[str]:
    return [str(snapshot.get("name")) for snapshot in snapshots]


def _require(tag: str, snapshots: list[dict[str, object]]) -> None:
    if tag not in _tags(snapshots):
        raise StateError(
            f"there is no snapshot {tag!r} (there are: {', '.join(_tags(snapshots)) or 'none'})",
            hint="see `pbotvm-qemu snapshot list`",
        )
