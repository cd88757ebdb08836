"""When a machine counts as sick, and when not."""

from __future__ import annotations

import asyncio

import pytest

from pbotvm_qemu.config import WatchdogConfig
from pbotvm_qemu.errors import GuestError
from pbotvm_qemu.watchdog import BURNING, LOST, SILENT, Watchdog

LOOK = 0.01


class Machine:
    """A machine as the watchdog sees it. Processor time is counted in looks, so that no clock is involved."""

    def __init__(self) -> None:
        self.used = 0.0
        self.rate = 0.0  # processor seconds for each question
        self.idle = True
        self.silent = False
        self.gone = False
        self.lost = asyncio.Event()
        self.pings = 0

    def cpu(self) -> float | None:
        self.used += self.rate
        return None if self.gone else self.used

    async def ping(self, _within: float) -> None:
        self.pings += 1
        if self.silent:
            raise GuestError("no answer")

    def watch(self, **changes: float) -> asyncio.Task[str]:
        config = WatchdogConfig(**({"interval": LOOK, "cpu": 50.0, "samples": 3} | changes))  # type: ignore[arg-type]
        dog = Watchdog(config, cpu=self.cpu, ping=self.ping, lost=self.lost.wait, idle=lambda: self.idle)
        return asyncio.create_task(dog.offence())


async def still(task: asyncio.Task[str], machine: Machine, *, looks: int = 10) -> None:
    """Hold that nothing is found in so many looks."""
    await asyncio.sleep(LOOK * looks)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_quiet_machine_is_left_alone() -> None:
    machine = Machine()
    task = machine.watch()
    while machine.pings < 5:
        await asyncio.sleep(LOOK)
    await still(task, machine)


async def test_a_machine_that_burns_while_nothing_runs_is_found() -> None:
    machine = Machine()
    machine.rate = 100.0
    assert await asyncio.wait_for(machine.watch(), 20) == BURNING


async def test_honest_load_is_no_offence() -> None:
    machine = Machine()
    machine.rate = 100.0
    machine.idle = False
    machine.silent = True
    await still(machine.watch(), machine)


async def test_load_that_stops_is_no_offence() -> None:
    machine = Machine()
    machine.rate = 100.0
    task = machine.watch(samples=1000)
    while machine.pings < 3:
        await asyncio.sleep(LOOK)
    machine.rate = 0.0
    await still(task, machine)


async def test_a_silent_agent_is_found_at_the_second_question() -> None:
    machine = Machine()
    machine.silent = True
    assert await asyncio.wait_for(machine.watch(), 20) == SILENT
    assert machine.pings == 2


async def test_a_lost_channel_is_found_at_once_also_without_looks() -> None:
    machine = Machine()
    task = machine.watch(interval=0)
    await asyncio.sleep(0)
    machine.lost.set()
    assert await asyncio.wait_for(task, 20) == LOST


async def test_without_looks_nothing_else_is_found() -> None:
    machine = Machine()
    machine.rate, machine.silent = 100.0, True
    await still(machine.watch(interval=0), machine)


async def test_a_process_that_is_gone_is_for_others_to_notice() -> None:
    machine = Machine()
    machine.gone = True
    await still(machine.watch(), machine)
