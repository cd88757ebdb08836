"""Three ways to a clean machine, behind one interface.

`clone`: each run gets a QEMU process of its own, thawed from the template. Any number can live at once.
`restart`: each run gets a new process that loads the clean snapshot from the machine's disk. One at a time.
`loadvm`: one process stays and loads the snapshot after each run; when that fails, it is restarted. One at a time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from typing import IO, TYPE_CHECKING, Literal, Protocol

from pbotvm_qemu import config, paths, template
from pbotvm_qemu.config import SNAPSHOT
from pbotvm_qemu.errors import ConfigError, GuestError, HostError, MonitorError, StateError
from pbotvm_qemu.machine import RESTORE_TIMEOUT, VirtualMachine
from pbotvm_qemu.plan import Memory, check_qemu

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pbotvm_qemu.plan import Plan
    from pbotvm_qemu.template import Frozen, Template

log = logging.getLogger(__name__)

Name = Literal["clone", "loadvm", "restart"]


class Way(Protocol):
    """How a machine becomes clean."""

    name: Name
    why: str  # in words: why this way was chosen
    plan: Plan
    single: bool  # whether there is one machine, with ports of its own, and so awake all the time

    async def start(self) -> VirtualMachine:
        """Return a clean machine that was started for it. The caller stops it. Raises what VirtualMachine raises."""

    async def renew(self, machine: VirtualMachine) -> bool:
        """Make a used machine clean again; False when it must be ended and another one started."""

    def release(self) -> None:
        """Let go of what machines are started from: none will be any more."""


class Clone:
    """Copy-on-write clones of a template.

    `shared` False gives each clone a copy of the memory for itself: no page of it is shared with another guest, which
    closes a side channel and costs a copy of the memory that is in use.
    """

    name: Name = "clone"
    single = False

    def __init__(self, plan: Plan, source: Template, *, why: str, shared: bool = True) -> None:
        self.plan = plan.restored(source.memory)
        self.why = why
        self._release = template.use(self, source)
        self._template = source
        self._shared = shared
        self._numbers = itertools.count(1)

    async def start(self) -> VirtualMachine:
        """Return a new clone. Raises StateError when the template was changed."""
        check_qemu(self.plan.config.name, self.plan.qemu, self._template.fingerprint)
        self._template.check()
        memory = None if self._shared else await asyncio.to_thread(template.private_memory, self._template)
        return await self._thaw(self.plan, self._template.frozen, memory)

    async def thaw_saved(self, frozen: Frozen) -> VirtualMachine:
        """Return a machine that goes on where a clone was saved. Its memory comes with the state."""
        return await self._thaw(dataclasses.replace(self.plan, memory=Memory()), frozen, None)

    async def _thaw(self, plan: Plan, frozen: Frozen, memory: IO[bytes] | None) -> VirtualMachine:
        hostname = f"{plan.config.name}-{next(self._numbers)}"
        machine = VirtualMachine(_of_today(plan), thaw=frozen, own_memory=memory, hostname=hostname)
        return await machine.__aenter__()

    async def renew(self, machine: VirtualMachine) -> bool:
        """Have it ended: a clone serves once."""
        return False

    def release(self) -> None:
        """Let the template be deleted."""
        self._release()


class Restart:
    """A new process from the snapshot on the machine's own disk."""

    name: Name = "restart"
    single = True

    def __init__(self, plan: Plan, fingerprint: Mapping[str, str], *, why: str) -> None:
        self.plan = plan
        self.why = why
        self._fingerprint = fingerprint

    async def start(self) -> VirtualMachine:
        """Return the machine, started from its snapshot. Raises StateError when QEMU is not the same any more."""
        check_qemu(self.plan.config.name, self.plan.qemu, self._fingerprint)
        return await VirtualMachine(_of_today(self.plan)).__aenter__()

    async def renew(self, machine: VirtualMachine) -> bool:
        """Have the process ended."""
        return False

    def release(self) -> None:
        """Do nothing: a lock holds the machine's own disk."""

    def use(self, tag: str) -> None:
        """Have later starts load snapshot `tag`."""
        self.plan = dataclasses.replace(self.plan, loadvm=tag)


class LoadVM(Restart):
    """One process that goes back to the snapshot after each run."""

    name: Name = "loadvm"

    def __init__(self, plan: Plan, fingerprint: Mapping[str, str], *, why: str) -> None:
        problem = "a QEMU that loads snapshots cannot have a vhost-user device, whose state it cannot save"
        super().__init__(dataclasses.replace(plan, transport_problem=problem), fingerprint, why=why)

    async def renew(self, machine: VirtualMachine) -> bool:
        """Load the snapshot in the running process.

        Under emulation that does not rewind the guest's clock, and some guests then hang: there is a short deadline.
        """
        tag = self.plan.loadvm or SNAPSHOT
        try:
            await machine.revert(tag, timeout=RESTORE_TIMEOUT[self.plan.accelerator] / 4)
        except (GuestError, MonitorError) as exc:
            log.warning("snapshot-load did not bring machine %s back (%s); starting a new process", machine.name, exc)
            return False
        return True


def _of_today(plan: Plan) -> Plan:
    """Return `plan` with the network's settings as they are now.

    `net up` gives a changed policy to guests that run; those that a keeper starts later must not have the old one.
    """
    if plan.network is None or plan.config.net == "none":
        return plan
    try:
        return dataclasses.replace(plan, network=config.load(paths.config_file()).network)
    except ConfigError as exc:
        log.error("machine %s starts with the network settings of before: %s", plan.config.name, exc)  # noqa: TRY400 - the message says it all
        return plan


def choose(plan: Plan, fingerprint: dict[str, str], wanted: str, *, shared: bool = True) -> Way:
    """Return the way that `wanted` names; "auto" means clone where there is a usable template, else restart.

    Raises StateError when "clone" is wanted and the template cannot be used, or when it is there but does not fit.
    """
    if wanted == "restart":
        return Restart(plan, fingerprint, why="chosen by configuration")
    if wanted == "loadvm":
        return LoadVM(plan, fingerprint, why="chosen by configuration")
    if wanted not in ("auto", "clone"):
        raise HostError(f"there is no way back called {wanted!r}", hint="use auto, clone, loadvm or restart")
    name = plan.config.name
    if wanted == "auto" and not template.exists(name):
        return Restart(plan, fingerprint, why="the machine has no template; `create --force` makes one")
    why = "chosen by configuration" if wanted == "clone" else "the quickest way, and the machine has a template"
    try:
        return Clone(plan, template.matching(name, fingerprint), why=why, shared=shared)
    except StateError as exc:
        if wanted == "auto":
            exc.hint = f"{exc.hint}; meanwhile --revert restart works from the snapshot"
        raise
