"""Machines that wait keep warm in what callers use, and nobody is worse off for it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import errands
from pbotvm_qemu import pool as pools
from pbotvm_qemu.errors import GuestError, MonitorError, RunLostError, UsedMachineError
from tests.unit.pretend import OUTCOME, Machine, Way, program, quick, running, settle, use, warm, warmth  # noqa: F401 - quick

if TYPE_CHECKING:
    from collections.abc import Callable

    from pbotvm_qemu.channel import Outcome
    from pbotvm_qemu.guest.spec import RunSpec
    from pbotvm_qemu.pool import Pool


async def test_machines_that_wait_run_the_languages_that_are_named_and_sleep_again() -> None:
    way = Way()
    async with running(way, size=2, most=2, warmth=warmth("sh", "c11")) as pool:
        await warm(pool, "sh", "c11")
        assert [(machine.ran, machine.proofs, machine.asleep) for machine in way.made] == [(["sh", "c11"], 1, True)] * 2
        assert (pool.status()["runs"], pool.status()["reverts"]) == (0, {})


async def test_machines_that_wait_run_what_was_used_last() -> None:
    way = Way()
    async with running(way, size=2, most=4, warmth=warmth(recent=1)) as pool:
        await pool.ready()
        await use(pool, "python3")
        await warm(pool, "python3")
        await use(pool, "sh")
        await warm(pool, "sh")
        assert sorted(machine.ran for machine in way.made if not machine.stopped) == [["python3", "sh"], ["sh"]]
        async with pool.lease() as lease:
            assert not lease.asleep


async def test_a_language_that_nobody_knows_is_not_kept_warm() -> None:
    way = Way()
    async with running(way, size=1, most=2, warmth=warmth()) as pool:
        await use(pool, "cobol")
        await settle(pool, 1)
        assert pool.warmth.wanted == ()


async def test_nothing_is_warmed_up_while_the_processors_have_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    way = Way()
    way.slow.add("c11")
    async with running(way, size=1, most=2, warmth=warmth()) as pool:
        await use(pool, "sh")
        await warm(pool, "sh")
        work = asyncio.create_task(use(pool, "c11"))
        while pool._starting or len(way.made) < 3:
            await asyncio.sleep(0.001)
        await settle(pool, 1)
        assert way.made[2].ran == []
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        while way.made[2].ran == []:
            await asyncio.sleep(0.001)


async def test_a_caller_does_not_wait_for_a_machine_that_is_being_warmed_up() -> None:
    way = Way()
    way.slow.add("c11")
    async with running(way, size=1, most=2, warmth=warmth("c11")) as pool:
        await pool.ready()
        while not pool._warming:
            await asyncio.sleep(0.001)
        assert (pool.status()["ready"], pool.status()["busy"]) == (1, 0)
        async with pool.lease() as lease:
            assert lease.machine.pid != way.made[0].pid
            assert lease.machine.ran == []  # type: ignore[attr-defined]
            while not way.made[0].stopped:
                await asyncio.sleep(0.001)


async def test_another_machine_that_waits_serves_while_one_is_warmed_up() -> None:
    way = Way()
    way.slow.add("c11")
    async with running(way, size=2, most=2, warmth=warmth("c11")) as pool:
        while not pool._warming or len(way.made) < 2:
            await asyncio.sleep(0.001)
        await settle(pool, 1)
        async with pool.lease() as lease:
            assert lease.machine.pid == way.made[1].pid
        assert not way.made[0].stopped


async def test_a_machine_that_dies_while_it_is_warmed_up_is_replaced() -> None:
    way = Way()
    way.slow.add("c11")
    async with running(way, size=1, most=1, warmth=warmth("c11")) as pool:
        while not way.made or not way.made[0].ran:
            await asyncio.sleep(0.001)
        way.slow.clear()
        way.made[0].die()
        await warm(pool, "c11")
        assert (pool.deaths, len(way.made)) == (1, 2)


async def test_a_sample_that_costs_machines_is_given_up() -> None:
    way = Way()
    way.broken.add("c11")
    async with running(way, size=1, most=1, warmth=warmth("c11")) as pool:
        while pool.warmth.wanted:
            await asyncio.sleep(0.001)
        await settle(pool, 1)
        assert len(way.made) == 4
        await use(pool, "sh")


async def test_a_single_machine_that_was_put_back_is_warmed_up_again() -> None:
    way = Way(single=True, renews=True)
    async with running(way, warmth=warmth("sh", recent=0)) as pool:
        await warm(pool, "sh")
        await use(pool, "python3")
        await warm(pool, "sh")
        assert way.made[0].ran == ["sh", "python3", "sh"]


async def test_a_drained_pool_does_not_wait_for_a_machine_that_is_being_warmed_up() -> None:
    way = Way()
    way.slow.add("c11")
    async with running(way, size=1, most=1, warmth=warmth("c11")) as pool:
        while not pool._warming:
            await asyncio.sleep(0.001)
        assert await pool.drain(5.0)
        assert way.live == 0


# When somebody wants the machine, or it fails -------------------------------------------------------------------------


async def until(what: Callable[[], object]) -> None:
    while not what():
        await asyncio.sleep(0.001)


@pytest.fixture
def lasting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have programs take longer than the start of a machine, as nearly all do."""
    real = Machine.execute

    async def execute(self: Machine, spec: RunSpec, content: object, **kwargs: object) -> Outcome:
        await asyncio.sleep(0.02 if spec.language else 0)
        return await real(self, spec, content, **kwargs)

    monkeypatch.setattr(Machine, "execute", execute)


@pytest.mark.usefixtures("lasting")
async def test_callers_one_after_the_other_lose_no_machine() -> None:
    way = Way()
    async with running(way, size=1, most=3, queue_wait=1, warmth=warmth()) as pool:
        for _ in range(12):
            await use(pool, "sh")
        await until(lambda: not pool.busy)


@pytest.mark.usefixtures("lasting")
async def test_a_drain_just_after_a_run_ends() -> None:
    async with running(Way(), size=1, most=2, warmth=warmth()) as pool:
        await use(pool, "sh")
        assert await pool.drain(5.0)


async def test_a_sample_that_was_ended_half_way_leaves_no_clean_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    way = Way()

    async def execute(self: Machine, spec: RunSpec, _content: object, **_kwargs: object) -> Outcome:
        if not spec.language:
            return OUTCOME
        self.ran.append(spec.language)
        return dataclasses.replace(OUTCOME, status=None, signal=9, timed_out=True, limit="wall")

    monkeypatch.setattr(Machine, "execute", execute)
    async with running(way, size=1, most=2, warmth=warmth("sh")) as pool:
        await until(lambda: not pool.warmth.wanted)
        await settle(pool, 1)
        assert [machine.stopped for machine in way.made if machine.ran] == [True] * 3


async def test_machines_that_do_not_wake_are_not_used_up_for_warmth(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wake(_self: Machine) -> None:
        raise MonitorError("QEMU did not answer in time")

    monkeypatch.setattr(Machine, "wake", wake)
    way = Way()
    async with running(way, size=1, most=1, warmth=warmth("sh")) as pool:
        await until(lambda: not pool.warmth.wanted)
        await settle(pool, 1)
        assert len(way.made) == 4


@pytest.mark.parametrize("other", [True, False])
async def test_a_machine_that_falls_asleep_while_the_way_changes_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, *, other: bool
) -> None:
    gate = asyncio.Event()
    real = Machine.sleep

    async def sleep(self: Machine) -> None:
        if self.ran:
            await gate.wait()
        await real(self)

    monkeypatch.setattr(Machine, "sleep", sleep)
    old, new = Way(), Way()
    async with running(old, size=1, most=3, warmth=warmth("sh")) as pool:
        await until(lambda: pool._warming and pool._warming.errand is None)
        if other:
            pool.use(new)  # type: ignore[arg-type]
        else:
            pool.replace_ready()
        gate.set()
        await until(lambda: old.made[0].stopped)
        async with pool.lease() as lease:
            assert lease.machine.pid != old.made[0].pid or other


async def test_with_no_revert_a_machine_that_a_peer_has_used_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[Machine] = set()
    refused = 0
    real = Machine.execute

    async def execute(self: Machine, spec: RunSpec, content: object, **kwargs: object) -> Outcome:
        nonlocal refused
        if self in used:
            refused += 1
            raise UsedMachineError("this machine has run a program for another peer")
        return await real(self, spec, content, **kwargs)

    monkeypatch.setattr(Machine, "execute", execute)
    way = Way(single=True)
    async with running(way, no_revert=True, warmth=warmth("sh", recent=0)) as pool:
        await warm(pool, "sh")
        used.add(way.made[0])
        with pytest.raises(UsedMachineError):
            await use(pool, "python3")
        await warm(pool, "sh")
        await use(pool, "python3")
        assert refused == 2, "for the caller, and when it was to show that it works"


async def test_with_no_revert_a_machine_shows_after_each_run_that_it_works() -> None:
    way = Way(single=True)
    async with running(way, no_revert=True, warmth=warmth("sh", recent=0)) as pool:
        await warm(pool, "sh")
        before = way.made[0].proofs
        await use(pool, "python3")
        await until(lambda: way.made[0].proofs > before)
        await settle(pool, 1)


async def test_machines_are_warmed_up_and_replaced_after_an_adoption() -> None:
    way = Way()
    async with running(way, size=1, most=4, warmth=warmth(recent=1)) as pool:
        lease = await pool.take()
        gate = asyncio.Event()

        async def slow() -> Machine:
            await gate.wait()
            return await way.start()

        adopting = asyncio.create_task(pool.adopt(way, slow))  # type: ignore[arg-type]
        await pool.execute(lease, program("sh"), [], on_output=errands.ignore)
        gate.set()
        other = await adopting
        await until(lambda: pool.status()["warm"] == ["sh"])
        for one in (lease, other):
            pool.give_back(one)


async def test_callers_get_the_warmest_machine_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    async with running(Way(), size=2, most=4, warmth=warmth(recent=1)) as pool:
        await settle(pool, 2)
        pool.warmth.used("sh")
        pool._warm_soon()
        await until(lambda: pool._warming)
        pool._running += 1  # a program starts meanwhile
        await settle(pool, 2)
        pool._running -= 1
        async with pool.lease() as lease:
            assert lease.warm == {"sh"}


async def test_reverts_after_a_sample_are_not_counted_as_those_of_runs() -> None:
    way = Way()
    way.slow.add("c11")
    async with running(way, size=1, most=2, warmth=warmth("c11")) as pool:
        await until(lambda: way.made and way.made[0].ran)
        lease = await pool.take()
        lease.clean = True
        pool.give_back(lease)
        await until(lambda: way.made[0].stopped)
        assert pool.status()["reverts"] == {"warm-up": 1}


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_happens_no_machine_is_lost_and_none_is_handed_out_unclean(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr("os.cpu_count", lambda: chance.choice((1, 2, 4, 8)))
    monkeypatch.setattr(pools, "_HEAD_START", 0.001)
    monkeypatch.setattr("pbotvm_qemu.warmth._FAILURES", 1 << 30)
    dirty: set[Machine] = set()

    async def execute(
        self: Machine, spec: RunSpec, _content: object, *, on_output: object, **_kwargs: object
    ) -> Outcome:
        assert not self.asleep
        if spec.language:
            dirty.add(self)
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(chance.choice((0, 0, 0.001)))
            if not self.alive:
                raise RunLostError("it died")
            if spec.language and chance.random() < 0.03:
                raise GuestError("the agent is silent")
        if on_output is errands.ignore:  # a sample, which leaves nothing
            dirty.discard(self)
        return OUTCOME

    async def sleep(self: Machine) -> None:
        await asyncio.sleep(chance.choice((0, 0.001)))
        if chance.random() < 0.02:
            raise MonitorError("it does not sleep")
        self.asleep = True

    async def wake(self: Machine) -> None:
        await asyncio.sleep(chance.choice((0, 0.001)))
        if chance.random() < 0.02 or not self.alive:
            raise MonitorError("it does not wake")
        self.asleep = False

    for function in (execute, sleep, wake):
        monkeypatch.setattr(Machine, function.__name__, function)
    size, most = chance.choice(((1, 1), (1, 2), (2, 3), (3, 5), (0, 2)))
    always = chance.choice(((), ("sh",)))

    async def output(_stream: object, _data: bytes) -> None:
        pass

    async def call(pool: Pool, name: str) -> None:
        for _ in range(12):
            with contextlib.suppress(GuestError, MonitorError, TimeoutError):
                async with asyncio.timeout(0.001 if chance.random() < 0.2 else 5), pool.lease(caller=name) as lease:
                    assert lease.machine not in dirty  # type: ignore[comparison-overlap]
                    language = chance.choice(("sh", "python3", "c11"))
                    await pool.execute(lease, program(language), [], on_output=output)
            what = chance.random()
            if what < 0.08:
                pool.replace_ready()
            elif what < 0.14 and (alive := [machine for machine in pool.machines if machine.alive]):
                chance.choice(alive).die()  # type: ignore[attr-defined]
            assert len(pool.machines) <= most
            assert not any(lease.out for lease in pool._ready)
            await asyncio.sleep(chance.choice((0, 0, 0.001, 0.004)))

    way = Way()
    async with running(way, size=size, most=most, queue=100, queue_wait=5, warmth=warmth(*always)) as pool:
        await asyncio.gather(*(call(pool, str(number)) for number in range(chance.choice((1, 2, 4)))))
        await until(lambda: pool._waiting >= size and not pool.busy)
        assert await pool.drain(5.0)
