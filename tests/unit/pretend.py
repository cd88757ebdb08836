"""Machines and ways back to clean that only pretend, for tests of the pool."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from pbotvm_qemu import errands
from pbotvm_qemu import pool as pools
from pbotvm_qemu.channel import Hello, Outcome
from pbotvm_qemu.config import MachineConfig
from pbotvm_qemu.errors import GuestError, MonitorError, RunLostError
from pbotvm_qemu.pool import Pool
from pbotvm_qemu.warmth import Warmth

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from pbotvm_qemu.guest.spec import RunSpec

OUTCOME = Outcome(
    status=0, signal=None, timed_out=False, cancelled=False, truncated=False, limit=None, stage="run", message="",
    wall_s=0.0, cpu_s=None, memory_peak=None,
)  # fmt: skip


class Machine:
    """Behaves towards the pool like a VirtualMachine, and has no guest."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.name = "m"
        self.pid = len(way.made) + 1000
        self.transport_why = ""
        self.hello = Hello("1", "fake", "k", "h")
        self.ready_s = 0.0
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.asleep = False
        self.stuck = False
        self.proofs = 0
        self.ran: list[str] = []  # languages
        self.stopped = False
        self.hold: asyncio.Event | None = None
        self.sick: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def watch(self, _config: object, _idle: object) -> str:
        return await asyncio.shield(self.sick)

    @property
    def alive(self) -> bool:
        return not self.exited.done()

    async def execute(self, spec: RunSpec, _content: object, **_kwargs: object) -> Outcome:
        assert not self.asleep
        if spec.language in self.way.broken:
            raise GuestError("the agent is silent")
        if spec.language:
            self.ran.append(spec.language)
        else:
            self.proofs += 1
        if self.hold:
            await self.hold.wait()
        elif spec.language in self.way.slow:
            await asyncio.shield(self.exited)
            raise RunLostError("QEMU died while the program ran")
        return OUTCOME

    async def sleep(self) -> None:
        self.asleep = True

    async def wake(self) -> None:
        if self.stuck:
            raise MonitorError("QEMU did not answer in time")
        self.asleep = False

    async def stop(self) -> None:
        self.stopped = True
        self.way.live -= 1
        if not self.exited.done():
            self.exited.set_result(0)

    def die(self) -> None:
        self.exited.set_result(-9)

    def last_words(self) -> str:
        return "QEMU died"


@dataclasses.dataclass
class _Plan:
    config: MachineConfig = dataclasses.field(default_factory=MachineConfig)
    loadvm: str | None = None


class Way:
    """Makes machines without delay, unless told otherwise."""

    name = "clone"
    why = "for the test"

    def __init__(self, *, single: bool = False, renews: bool = False) -> None:
        self.plan = _Plan()
        self.single = single
        self.renews = renews
        self.made: list[Machine] = []
        self.failures: list[Exception] = []
        self.live = 0
        self.most_live = 0
        self.gate: asyncio.Event | None = None
        self.released = False
        self.slow: set[str] = set()  # languages whose programs do not end
        self.broken: set[str] = set()

    async def start(self) -> Machine:
        if self.gate:
            await self.gate.wait()
        await asyncio.sleep(0)
        if self.failures:
            raise self.failures.pop(0)
        machine = Machine(self)
        self.made.append(machine)
        self.live += 1
        self.most_live = max(self.most_live, self.live)
        return machine

    async def renew(self, _machine: Machine) -> bool:
        return self.renews

    def release(self) -> None:
        self.released = self.live == 0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_BACKOFF", (0.01, 0.02))
    monkeypatch.setattr(pools, "_LOOK_AGAIN", 0.01)
    monkeypatch.setattr(pools, "_QUIET", 0.001)
    monkeypatch.setattr("pbotvm_qemu.process.memory_available", lambda: 1 << 40)


@contextlib.asynccontextmanager
async def running(way: Way, **options: Any) -> AsyncIterator[Pool]:
    async with asyncio.timeout(10), Pool(way, **options) as pool:  # type: ignore[arg-type]
        yield pool
    assert way.live == 0, "machines outlived the pool"
    assert pool.way.released  # type: ignore[attr-defined]


async def settle(pool: Pool, ready: int) -> None:
    while len(pool._ready) != ready or pool._starting:
        await asyncio.sleep(0.001)


def program(language: str) -> RunSpec:
    return errands.PROOF._replace(language=language)


def warmth(*always: str, recent: int = 2) -> Warmth:
    return Warmth({name: (program(name), []) for name in ("sh", "python3", "c11")}, always=always, recent=recent)


async def use(pool: Pool, language: str) -> None:
    await pool.run(program(language), [], on_output=errands.ignore)


async def warm(pool: Pool, *languages: str) -> None:
    while pool._warming or pool._starting or pool.busy or pool.status()["warm"] != list(languages):
        await asyncio.sleep(0.001)
