"""A clean machine for every run: one machine that is kept ready, and a bounded, fair queue in front of it.

After each run the QEMU process is ended and a new one is started from the snapshot, so that whatever a run did is gone
with it. The next caller waits for that; a pool of several clones that hides the wait can stand in the same place.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Self

from pbotvm_qemu.config import SNAPSHOT
from pbotvm_qemu.errors import GuestError, MonitorError, NeverRanError, PbotVMError, StateError
from pbotvm_qemu.machine import DISK, RESTORE_TIMEOUT, Plan, VirtualMachine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from pbotvm_qemu.channel import OnOutput, Outcome
    from pbotvm_qemu.guest.spec import RunSpec

log = logging.getLogger(__name__)

_SNAPSHOT_TIMEOUT = 120.0  # seconds to write a machine's memory
_BACKOFF = (0.2, 1.0, 5.0, 15.0)  # seconds between failed starts


@dataclasses.dataclass(slots=True)
class Lease:
    """A machine that one caller has for himself."""

    machine: VirtualMachine
    clean: bool = False  # set by a caller who ran nothing on it


class Pool:
    """Hands out a clean machine. A context manager: leaving it ends the machine.

    `on_process` is told the pid of every QEMU that is started, so that a crash of ours leaves nothing unknown.
    """

    def __init__(self, plan: Plan, *, queue: int, queue_wait: float, on_process: Callable[[int], None]) -> None:
        self._plan = plan
        self._queue = queue
        self._queue_wait = queue_wait
        self._on_process = on_process
        self._waiting: deque[asyncio.Future[VirtualMachine]] = deque()
        self._idle: VirtualMachine | None = None
        self._released = asyncio.Event()
        self._draining = False
        self._task: asyncio.Task[None] | None = None
        self._busy = 0
        self.tag = plan.loadvm or SNAPSHOT
        self.problem: PbotVMError | None = None
        self.runs = 0
        self.starts = 0
        self.deaths = 0

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._keep())
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._task
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_exception(_shutting_down())

    async def ready(self) -> None:
        """Wait until the first machine is up. Raises what kept it from starting."""
        while self._idle is None:
            if self.problem:
                raise self.problem
            await asyncio.sleep(0.02)

    async def drain(self, timeout: float) -> bool:
        """Refuse new runs, and wait up to `timeout` seconds for those under way; tell whether all have ended."""
        self._draining = True
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_exception(_shutting_down())
        until = time.monotonic() + timeout
        while self._busy and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return not self._busy

    def status(self) -> dict[str, object]:
        """Return figures for `status`."""
        idle = self._idle
        return {
            "ready": 1 if idle else 0,
            "busy": self._busy,
            "waiting": len(self._waiting),
            "runs": self.runs,
            "starts": self.starts,
            "deaths": self.deaths,
            "revert": "restart",
            "snapshot": self.tag,
            "pid": idle.pid if idle else None,
            "transport": idle.hello.transport if idle and idle.hello else None,
            "kernel": idle.hello.kernel if idle and idle.hello else None,
            "ready_s": round(idle.ready_s, 3) if idle else None,
            "problem": str(self.problem) if self.problem else None,
        }

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Lease]:
        """Have a clean machine for oneself; it is put back afterwards, unless the lease says that it is still clean.

        Raises NeverRanError when the queue is full or no machine came free in time.
        """
        lease = Lease(await self._take())
        self._busy += 1
        try:
            yield lease
        finally:
            self._busy -= 1
            if lease.clean and lease.machine.alive:
                self._offer(lease.machine)
            else:
                self._released.set()

    async def run(
        self,
        spec: RunSpec,
        content: Sequence[bytes],
        *,
        on_output: OnOutput,
        stdin: AsyncIterator[bytes] | None = None,
    ) -> Outcome:
        """Run a program on a clean machine, see Channel.execute for what is raised."""
        begin = time.monotonic()
        async with self.lease() as lease:
            machine = lease.machine
            queued = time.monotonic() - begin
            self.runs += 1
            clone = f"{machine.name}/{self.starts}"
            outcome = await machine.execute(spec, content, on_output=on_output, stdin=stdin)
        return dataclasses.replace(
            outcome,
            queue_s=round(queued, 4),
            transport=machine.hello.transport if machine.hello else "",
            clone=clone,
            revert="restart",
        )

    async def snapshots(self) -> list[dict[str, object]]:
        """Return the snapshots of the machine as QEMU's SnapshotInfo objects."""
        async with self.lease() as lease:
            lease.clean = True
            return await lease.machine.monitor.snapshots(DISK)

    async def snapshot_create(self, tag: str) -> None:
        """Save the machine as it stands now under a new tag. Raises StateError when the tag is taken."""
        async with self.lease() as lease:
            lease.clean = True
            monitor = lease.machine.monitor
            if tag in _tags(await monitor.snapshots(DISK)):
                raise StateError(f"there is a snapshot {tag!r} already", hint="delete it first, or use another tag")
            await monitor.snapshot_save(tag, DISK, timeout=_SNAPSHOT_TIMEOUT)

    async def snapshot_delete(self, tag: str) -> None:
        """Delete a snapshot. Raises StateError when there is none, or the machine starts from it."""
        async with self.lease() as lease:
            lease.clean = True
            if tag in (self.tag, SNAPSHOT):
                raise StateError(
                    f"snapshot {tag!r} is the one that runs start from", hint="revert to another one first"
                )
            _require(tag, await lease.machine.monitor.snapshots(DISK))
            await lease.machine.monitor.snapshot_delete(tag, DISK, timeout=_SNAPSHOT_TIMEOUT)

    async def revert(self, tag: str) -> str:
        """Put the machine back to snapshot `tag`, which later runs start from too; return the way that was taken.

        In the running process when that works ("loadvm"), else by a new process ("restart"). Raises StateError when
        there is no such snapshot, MonitorError when QEMU refuses; the machine is then as before.
        """
        async with self.lease() as lease:
            monitor = lease.machine.monitor
            lease.clean = True
            _require(tag, await monitor.snapshots(DISK))
            try:
                await lease.machine.revert(tag, timeout=RESTORE_TIMEOUT[self._plan.accelerator] / 4)
            except GuestError as exc:
                # Under emulation a load in process does not rewind the guest's clock, and some guests then hang.
                log.warning("the agent was silent after snapshot-load (%s); starting a new process", exc)
                lease.clean = False
            except MonitorError:
                lease.clean = False
                raise
            self.tag = tag
            return "loadvm" if lease.clean else "restart"

    async def _take(self) -> VirtualMachine:
        if self._draining:
            raise _shutting_down()
        if self._idle and not self._waiting:
            machine, self._idle = self._idle, None
            return machine
        if len(self._waiting) >= self._queue:
            raise NeverRanError(
                f"{self._queue} requests wait already", hint="try again later, or raise queue in [relay] of config.toml"
            )
        place: asyncio.Future[VirtualMachine] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            async with asyncio.timeout(self._queue_wait):
                return await place
        except BaseException as exc:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._offer(place.result())  # it came in the moment in which we gave up
            else:
                place.cancel()
                with contextlib.suppress(ValueError):
                    self._waiting.remove(place)
            if not isinstance(exc, TimeoutError):
                raise
            why = f": {self.problem}" if self.problem else ""
            raise NeverRanError(
                f"no machine came free within {self._queue_wait:.0f} s{why}", hint="try again later"
            ) from None

    def _offer(self, machine: VirtualMachine) -> None:
        """Give a clean machine to whoever waits longest."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(machine)
                return
        self._idle = machine

    async def _keep(self) -> None:
        """Keep one clean machine: start it, wait until it was used or died, end it, again."""
        failures = 0
        while True:
            self._released.clear()
            try:
                async with VirtualMachine(
                    dataclasses.replace(self._plan, loadvm=self.tag), on_started=self._on_process
                ) as machine:
                    failures = 0
                    self.problem = None
                    self.starts += 1
                    self._offer(machine)
                    await self._used_or_dead(machine)
                    self._idle = None
            except PbotVMError as exc:
                self.problem = exc
                log.error("%s", exc)  # noqa: TRY400 - the message says it all
                await asyncio.sleep(_BACKOFF[min(failures, len(_BACKOFF) - 1)])
                failures += 1

    async def _used_or_dead(self, machine: VirtualMachine) -> None:
        released = asyncio.create_task(self._released.wait())
        try:
            await asyncio.wait({released, machine.exited}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            released.cancel()
        if not self._released.is_set():
            self.deaths += 1
            log.error(
                "QEMU %d of machine %s died: %s", machine.pid, machine.name, machine.log_tail() or "its log is empty"
            )


def _shutting_down() -> NeverRanError:
    return NeverRanError("the machine is being stopped", hint="start it with `pbotvm-qemu run`")


def _tags(snapshots: list[dict[str, object]]) -> list[str]:
    return [str(snapshot.get("name")) for snapshot in snapshots]


def _require(tag: str, snapshots: list[dict[str, object]]) -> None:
    if tag not in _tags(snapshots):
        raise StateError(
            f"there is no snapshot {tag!r} (there are: {', '.join(_tags(snapshots)) or 'none'})",
            hint="see `pbotvm-qemu snapshot list`",
        )
