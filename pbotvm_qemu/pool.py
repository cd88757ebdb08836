"""A clean machine for every run: some are kept ready, and a bounded, fair queue stands in front of them.

A machine in the pool was started, has run a trifle to show that it works (and to have its first, slow steps behind
it), and then sleeps until it is handed out: its processors are stopped, and it costs no time. While fewer than half of
the processors run programs, those that sleep are woken one by one to run the samples of the languages that callers use.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import os
import time
from collections import Counter, deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Self

from pbotvm_qemu import accel, process
from pbotvm_qemu.config import WatchdogConfig
from pbotvm_qemu.errands import Errand, prove
from pbotvm_qemu.errors import HostError, MonitorError, NeverRanError, PbotVMError, UsedMachineError
from pbotvm_qemu.turns import Turns
from pbotvm_qemu.warmth import Warmth

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

    from pbotvm_qemu.channel import OnOutput, Outcome
    from pbotvm_qemu.guest.spec import RunSpec
    from pbotvm_qemu.machine import VirtualMachine
    from pbotvm_qemu.ways import Way

log = logging.getLogger(__name__)

_BACKOFF = (0.2, 1.0, 5.0, 15.0)  # seconds between failed starts
_HEAD_START = 0.02  # seconds until a successor is started: first the machine that is handed out begins its work
_QUIET = 0.1  # seconds without work before machines are warmed up
_LOOK_AGAIN = 1.0  # seconds until there may be memory for one more


@dataclasses.dataclass(slots=True, eq=False)
class Lease:
    """A machine that one caller has for himself until he gives it back."""

    machine: VirtualMachine
    way: Way  # that it was started in
    number: int  # how many machines this pool had started before it, plus one
    clean: bool = False  # set by a caller who ran nothing on it
    out: bool = False  # whether somebody has it
    asleep: bool = False
    lost: bool = False
    warm: set[str] = dataclasses.field(default_factory=set)  # the languages that it has run since it was clean
    errand: Errand | None = None  # what it is to run before it waits again
    returned: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    @property
    def clone(self) -> str:
        """What the machine is called in reports."""
        return f"{self.machine.name}/{self.number}"


def check_memory(memory: int) -> None:
    """Raise HostError when the host has no room for one more machine with `memory` bytes."""
    need = memory + accel.OVERHEAD
    if process.memory_available() < need:
        raise HostError(
            f"the host has no memory for one more machine, which needs up to {need >> 20} MiB",
            hint="end something, keep fewer machines (--pool), or make one with less --memory",
        )


def room(memory: int, available: int) -> int:
    """Return how many machines with `memory` bytes each fit into `available` bytes of the host's memory."""
    return available * 9 // 10 // (memory + accel.OVERHEAD)


class Pool:
    """Hands out clean machines. A context manager: leaving it ends them all.

    `size` machines are kept ready and unused, as long as not more than `most` live at once. `queue` requests may wait,
    each up to `queue_wait` seconds. `warmth` says in which languages those that wait are kept warm.
    """

    def __init__(
        self,
        way: Way,
        *,
        size: int = 1,
        most: int = 1,
        queue: int = 64,
        queue_wait: float = 60.0,
        watchdog: WatchdogConfig | None = None,
        no_revert: bool = False,
        warmth: Warmth | None = None,
    ) -> None:
        self.way = way
        self.warmth = warmth or Warmth({})
        self._memory = way.plan.config.memory
        self._most = 1 if way.single else max(most, 1)
        self._size = 1 if way.single else min(size, self._most)
        self._queue = queue
        self._queue_wait = queue_wait
        self._watchdog = watchdog or WatchdogConfig()
        self._no_revert = no_revert and way.single  # a clone serves once
        self._turns: Turns[Lease] = Turns()
        self._ready: deque[Lease] = deque()
        self._alive: set[Lease] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting = 0
        self._running = 0
        self._warming: Lease | None = None
        self._quiet: asyncio.TimerHandle | None = None
        # A burst must not take the processors away from those who run: half of them may start machines.
        self._half = max(1, (os.cpu_count() or 1) // 2)
        self._starters = asyncio.Semaphore(self._half)
        self._numbers = itertools.count(1)
        self._failures = 0
        self._hold: asyncio.TimerHandle | None = None
        self._draining = False
        self.problem: PbotVMError | None = None
        self.runs = 0
        self.starts = 0
        self.deaths = 0
        self.reverts: Counter[str] = Counter()  # by reason

    async def __aenter__(self) -> Self:
        self._refill()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._draining = True
        for timer in (self._hold, self._quiet):
            if timer:
                timer.cancel()
        self._turns.refuse(_shutting_down())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for lease in list(self._alive):  # of a task that was cancelled before its first step
            await self._end(lease)
        self.way.release()

    async def ready(self) -> None:
        """Wait until as many machines as wanted are up. Raises what kept the first one from starting."""
        while self._waiting < self._size:
            if self.problem and not self._alive:
                raise self.problem
            await asyncio.sleep(0.02)

    async def drain(self, timeout: float) -> bool:
        """Refuse new runs, and wait up to `timeout` seconds for those under way; tell whether all have ended."""
        self._draining = True
        self._turns.refuse(_shutting_down())
        self._stop_warming()
        until = time.monotonic() + timeout
        while self.busy and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return not self.busy

    @property
    def name(self) -> str:
        """The machine that its machines are copies of."""
        return self.way.plan.config.name

    @property
    def busy(self) -> int:
        """How many machines are handed out."""
        return sum(lease.out for lease in self._alive) - (self._warming is not None)

    @property
    def _waiting(self) -> int:
        """How many machines are ready; one that is being warmed up is."""
        return len(self._ready) + (self._warming is not None)

    @property
    def machines(self) -> list[VirtualMachine]:
        """The machines that live, ready or handed out."""
        return [lease.machine for lease in self._alive]

    def status(self) -> dict[str, object]:
        """Return figures for `status`."""
        first = next(iter(self._ready), None) or next(iter(self._alive), None)
        hello = first.machine.hello if first else None
        return {
            "ready": self._waiting,
            "busy": self.busy,
            "starting": self._starting,
            "size": self._size,
            "most": self._most,
            "waiting": len(self._turns),
            "runs": self.runs,
            "starts": self.starts,
            "deaths": self.deaths,
            "reverts": dict(self.reverts),
            "revert": self.way.name,
            "revert_why": self.way.why,
            "warm": list(self._warm_in()),
            "pids": sorted(lease.machine.pid for lease in self._alive),
            "transport": hello.transport if hello else None,
            "transport_why": first.machine.transport_why if first else None,
            "kernel": hello.kernel if hello else None,
            "ready_s": round(first.machine.ready_s, 3) if first else None,
            "problem": str(self.problem) if self.problem else None,
        }

    def _warm_in(self) -> Iterable[str]:
        """Yield the wanted languages that every machine that waits has run."""
        waiting = [*self._ready, *([self._warming] if self._warming else [])]
        return (name for name in self.warmth.wanted if waiting and all(name in lease.warm for lease in waiting))

    @asynccontextmanager
    async def lease(self, *, caller: str = "") -> AsyncIterator[Lease]:
        """Have a clean machine for oneself; see `take`."""
        lease = await self.take(caller=caller)
        try:
            yield lease
        finally:
            self.give_back(lease)

    async def take(self, *, caller: str = "") -> Lease:
        """Return a clean machine, which the caller must give back.

        `caller` names on whose behalf: waiting callers take turns. Raises NeverRanError when the queue is full or no
        machine came free in time.
        """
        try:
            async with asyncio.timeout(self._queue_wait):
                while True:
                    lease = await self._next(caller)
                    if await self._awake(lease):
                        return lease
        except TimeoutError:
            why = f": {self.problem}" if self.problem else ""
            raise NeverRanError(
                f"no machine came free within {self._queue_wait:.0f} s{why}", hint="try again later"
            ) from None

    def give_back(self, lease: Lease) -> None:
        """End a lease. The machine is made clean or replaced, unless the lease says that it is still clean."""
        lease.returned.set()

    async def run(
        self,
        spec: RunSpec,
        content: Sequence[bytes],
        *,
        on_output: OnOutput,
        stdin: AsyncIterator[bytes] | None = None,
        caller: str = "",
    ) -> Outcome:
        """Run a program on a clean machine, see Channel.execute for what is raised."""
        begin = time.monotonic()
        while True:
            async with self.lease(caller=caller) as lease:
                queued = time.monotonic() - begin
                try:
                    outcome = await self.execute(lease, spec, content, on_output=on_output, stdin=stdin)
                except UsedMachineError:  # over its serial line, by a peer of PBot's: it is put back now, if it ever is
                    if queued < self._queue_wait and not self._no_revert:
                        continue
                    raise
                return self.signed(outcome, lease, queued)

    async def execute(
        self,
        lease: Lease,
        spec: RunSpec,
        content: Sequence[bytes],
        *,
        on_output: OnOutput,
        stdin: AsyncIterator[bytes] | None = None,
    ) -> Outcome:
        """Run a program on a machine that the caller has."""
        self.runs += 1
        self.warmth.used(spec.language)
        self._running += 1
        try:
            return await lease.machine.execute(spec, content, on_output=on_output, stdin=stdin)
        finally:
            self._running -= 1
            self._warm_soon()

    def signed(self, outcome: Outcome, lease: Lease, queued: float) -> Outcome:
        """Return `outcome` with where and how it ran."""
        hello = lease.machine.hello
        return dataclasses.replace(
            outcome,
            queue_s=round(queued, 4),
            transport=hello.transport if hello else "",
            clone=lease.clone,
            revert=self.way.name,
        )

    async def adopt(self, way: Way, start: Callable[[], Awaitable[VirtualMachine]]) -> Lease:
        """Have `start` make one more machine, and return it handed out already: it counts as one of the pool's.

        Raises NeverRanError when no more may live, and whatever `start` raises.
        """
        if len(self._alive) + self._starting >= self._most:
            raise NeverRanError(
                f"{self._most} machines live already", hint="end a session, or allow more with most in [pool]"
            )
        self._starting += 1
        try:
            machine = await start()
            lease = self._enlist(machine, way)
            lease.out = True
        finally:
            self._starting -= 1
            self._refill()
            self._warm_soon()
        self._spawn(self._look_after(lease))
        return lease

    def use(self, way: Way) -> None:
        """Start machines in another way from now on; those that somebody has go on as they are."""
        self.way = way
        self.replace_ready()

    def replace_ready(self) -> None:
        """End the machines that wait unused, and have new ones started."""
        for lease in self._ready:
            lease.lost = True
            lease.returned.set()
        self._ready.clear()
        self._stop_warming(lost=True)
        self._refill()

    # Handing out -------------------------------------------------------------------------------------------------------

    async def _next(self, caller: str) -> Lease:
        """Return a machine from the pool, or the next one that comes free."""
        if self._draining:
            raise _shutting_down()
        if self._ready and not len(self._turns):
            lease = self._ready.popleft()
            lease.out = True
            asyncio.get_running_loop().call_later(_HEAD_START, self._refill)
            return lease
        if len(self._turns) >= self._queue:
            raise NeverRanError(
                f"{self._queue} requests wait already", hint="try again later, or raise queue in [relay] of config.toml"
            )
        place = self._turns.join(caller)
        self._stop_warming()
        self._refill()
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                lease = place.result()  # it came in the moment in which we gave up
                lease.clean = True
                self.give_back(lease)
            else:
                self._turns.leave(caller, place)
            raise

    async def _awake(self, lease: Lease) -> bool:
        """Let a machine that is handed out go on; False when it has died in its sleep."""
        if not lease.asleep:
            return True
        try:
            await lease.machine.wake()
        except MonitorError as exc:
            log.error("machine %s was lost while it waited: %s", lease.clone, exc)  # noqa: TRY400 - it says it all
            lease.lost = True
            self.give_back(lease)
            return False
        except BaseException:
            self.give_back(lease)  # asleep or awake, who knows: not clean
            raise
        lease.asleep = False
        return True

    def _offer(self, lease: Lease) -> None:
        """Give a clean machine to whose turn it is, or keep it ready."""
        self._warmed(lease)
        lease.out, lease.clean = True, False
        if not self._turns.serve(lease):
            lease.out = False
            if lease.warm:
                self._ready.appendleft(lease)  # callers get the warmest first
            else:
                self._ready.append(lease)
            self._warm_soon()

    # Lives -------------------------------------------------------------------------------------------------------------

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _refill(self) -> None:
        """Start as many machines as are wanted and allowed."""
        if self._draining or self._hold:
            return
        while self._waiting + self._starting < max(self._size, len(self._turns)):
            if len(self._alive) + self._starting >= self._most:
                return
            try:
                check_memory(self._memory)
            except HostError as exc:
                self._failed(exc, wait=_LOOK_AGAIN)
                return
            self._starting += 1
            self._spawn(self._live())

    def _failed(self, problem: PbotVMError, *, wait: float | None = None) -> None:
        """Note that a start failed, and try again after a while."""
        self.problem = problem
        log.error("%s", problem)
        if wait is None:
            wait = _BACKOFF[min(self._failures, len(_BACKOFF) - 1)]
            self._failures += 1
        if self._hold:
            self._hold.cancel()
        self._hold = asyncio.get_running_loop().call_later(wait, self._resume)
        self._warm_soon()

    def _resume(self) -> None:
        self._hold = None
        self._refill()

    def _enlist(self, machine: VirtualMachine, way: Way) -> Lease:
        self.starts += 1
        self._failures = 0
        self.problem = None
        lease = Lease(machine, way, next(self._numbers))
        self._alive.add(lease)
        return lease

    async def _live(self) -> None:
        """One machine's life: started, used, ended."""
        try:
            async with self._starters:
                way = self.way
                lease = self._enlist(await way.start(), way)
                try:
                    await self._prepare(lease)
                except BaseException:
                    await self._end(lease)
                    raise
        except PbotVMError as exc:
            self._starting -= 1
            self._failed(exc)
            return
        except BaseException:
            self._starting -= 1
            raise
        self._starting -= 1
        if lease.way is not self.way:  # meanwhile
            await self._end(lease)
            return
        self._offer(lease)
        await self._look_after(lease)

    async def _prepare(self, lease: Lease, *, proved: bool = False) -> None:
        """Have a machine show that it works, and put it to sleep; unless somebody waits for it, who will see."""
        if len(self._turns):
            return
        if not proved:
            await prove(lease.machine.execute, lease.clone)
        # A single machine has serial lines, on which peers of PBot's want answers.
        if not len(self._turns) and not self.way.single:
            await lease.machine.sleep()
            lease.asleep = True

    async def _look_after(self, lease: Lease) -> None:
        """Follow a machine until its end, and see to a successor."""
        try:
            while await self._used_and_well(lease):
                lease.returned.clear()
                errand = lease.errand
                if errand:
                    lease.clean = await self._warm(lease, errand)
                    if not lease.machine.alive:
                        lease.returned.set()
                        continue
                if not lease.clean and (errand or not self._no_revert):
                    self.reverts["warm-up" if errand else "run"] += 1
                    if not await lease.way.renew(lease.machine):
                        break
                    lease.warm.clear()
                if self._unwanted(lease):
                    break
                if not lease.asleep:
                    await self._prepare(lease, proved=lease.clean and errand is not None)
                if self._unwanted(lease):  # by now
                    break
                self._offer(lease)
        except PbotVMError as exc:
            log.error("machine %s is of no use any more: %s", lease.clone, exc)  # noqa: TRY400 - it says it all
        finally:
            await self._end(lease)

    def _unwanted(self, lease: Lease) -> bool:
        return lease.lost or lease.way is not self.way

    async def _used_and_well(self, lease: Lease) -> bool:
        """Wait until the machine is given back, dies or falls sick; tell whether it can be used again."""
        returned = asyncio.create_task(lease.returned.wait())
        sick = asyncio.create_task(lease.machine.watch(self._watchdog, lambda: not lease.out and not lease.asleep))
        try:
            await asyncio.wait({returned, lease.machine.exited, sick}, return_when=asyncio.FIRST_COMPLETED)
            if lease.out:  # whoever has it sees its end first, and then gives it back
                await returned
            reason = "died" if not lease.machine.alive else "lost" if lease.lost else ""
            if not reason and sick.done() and not returned.done():
                reason = sick.result()
        finally:
            for task in (returned, sick):
                task.cancel()
            await asyncio.gather(returned, sick, return_exceptions=True)
        if not reason:
            return not self._draining
        if reason == "died":
            log.error("machine %s was lost: %s", lease.clone, lease.machine.last_words())
        if lease in self._ready:
            self._ready.remove(lease)  # nobody must get it while it is ended
        if lease.out or reason != "lost":
            self.deaths += reason in ("died", "lost")
            self.reverts[reason] += 1
            log.warning("revert machine=%s pid=%d reason=%s", lease.clone, lease.machine.pid, reason)
        return False

    async def _end(self, lease: Lease) -> None:
        if lease in self._ready:
            self._ready.remove(lease)
        try:
            await lease.machine.stop()
        finally:
            self._alive.discard(lease)
            self._warmed(lease)
            self._refill()
            self._warm_soon()

    # Warming up --------------------------------------------------------------------------------------------------------

    def _warm_soon(self) -> None:
        """Look in a moment whether there is time to warm machines up: whoever calls again at once is to find them asleep."""
        if not self._quiet and not self._draining:
            self._quiet = asyncio.get_running_loop().call_later(_QUIET, self._warm_now)

    def _warm_now(self) -> None:
        """Have a machine that waits run what callers use, when the processors have nothing better to do."""
        self._quiet = None
        if self._warming or self._starting or self._running >= self._half or len(self._turns) or self._draining:
            return
        for lease in self._ready:
            language = self.warmth.next(lease.warm)
            if language is not None:
                self._ready.remove(lease)
                self._warming = lease
                lease.out = True
                lease.errand = Errand(language, *self.warmth.sample(language))
                lease.returned.set()
                return

    async def _warm(self, lease: Lease, errand: Errand) -> bool:
        """Have a machine run a sample; tell whether it is as clean as before, which only a sample that ended well leaves it."""
        clean = False
        try:
            clean = await errand.run(lease.machine.execute, lease.machine.wake if lease.asleep else None)
        except UsedMachineError:
            pass  # by a peer of PBot's: it is put back now
        except PbotVMError as exc:
            self.warmth.failed(errand.language, exc)
        finally:
            lease.errand = None
        if clean:
            self.warmth.worked(errand.language)
            lease.warm.add(errand.language)
            lease.asleep = False
        else:
            self._warmed(lease)
            self._refill()
        return clean

    def _stop_warming(self, *, lost: bool = False) -> None:
        """Give up the machine that is being warmed up, for somebody who would have to wait for it, or because it is `lost`.

        A single machine is waited for instead: to start it again would take longer.
        """
        lease = self._warming
        if lease and lost:
            lease.lost = True
        if lease and lease.errand and not self.way.single:
            lease.errand.given_up.set()
            self._warming = None

    def _warmed(self, lease: Lease) -> None:
        if self._warming is lease:
            self._warming = None


def _shutting_down() -> NeverRanError:
    return NeverRanError("the machine is being stopped", hint="start it with `pbotvm-qemu run`")
