"""The pool with machines that only pretend: who gets one, when, and what happens to those that die."""

from __future__ import annotations

import asyncio

import pytest

from pbotvm_qemu import pool as pools
from pbotvm_qemu.errors import LaunchError, NeverRanError
from tests.unit.pretend import OUTCOME, Machine, Way, program, quick, running, settle, use, warm, warmth  # noqa: F401 - quick


async def test_machines_are_proved_and_put_to_sleep_before_they_are_offered() -> None:
    way = Way()
    async with running(way, size=3, most=5) as pool:
        await pool.ready()
        assert [(machine.proofs, machine.asleep) for machine in way.made] == [(1, True)] * 3
        async with pool.lease() as lease:
            assert not lease.asleep
            assert lease.machine.pid == way.made[0].pid


async def test_each_lease_has_a_machine_of_its_own_and_it_is_ended_after_it() -> None:
    way = Way()
    async with running(way, size=2, most=4) as pool:
        await pool.ready()
        async with pool.lease() as one, pool.lease() as two:
            assert one.machine is not two.machine
            await settle(pool, 2)
            assert pool.status()["busy"] == 2
        while way.live != 2:
            await asyncio.sleep(0.001)
        assert way.made[0].stopped
        assert way.made[1].stopped


async def test_never_more_than_allowed_live_at_once() -> None:
    way = Way()
    async with running(way, size=2, most=3, queue=100) as pool:

        async def call() -> None:
            async with pool.lease():
                await asyncio.sleep(0.001)

        await asyncio.gather(*(call() for _ in range(40)))
        await settle(pool, 2)
    assert way.most_live <= 3
    assert len(way.made) >= 40


async def test_a_clean_machine_is_offered_again() -> None:
    way = Way()
    async with running(way, size=1, most=1) as pool:
        for _ in range(3):
            async with pool.lease() as lease:
                lease.clean = True
        await settle(pool, 1)
    assert len(way.made) == 1


async def test_a_way_that_renews_keeps_its_machine() -> None:
    way = Way(single=True, renews=True)
    async with running(way, size=5, most=5) as pool:
        for _ in range(3):
            async with pool.lease():
                pass
        await settle(pool, 1)
    assert len(way.made) == 1


async def test_a_single_machine_stays_awake_for_its_ports() -> None:
    way = Way(single=True)
    async with running(way, size=1, most=1) as pool:
        await pool.ready()
        assert (way.made[0].proofs, way.made[0].asleep) == (1, False)


async def test_a_machine_that_dies_in_the_pool_is_replaced_and_counted() -> None:
    way = Way()
    async with running(way, size=2, most=4) as pool:
        await pool.ready()
        way.made[0].die()
        while len(way.made) < 3:
            await asyncio.sleep(0.001)
        await settle(pool, 2)
        assert pool.status()["deaths"] == 1
        assert way.made[0].stopped


async def test_a_machine_that_does_not_wake_is_passed_over_and_ended() -> None:
    way = Way()
    async with running(way, size=2, most=4) as pool:
        await pool.ready()
        way.made[0].stuck = True
        async with pool.lease() as lease:
            assert lease.machine.pid == way.made[1].pid
        await settle(pool, 2)
        assert pool.deaths == 1
        assert way.made[0].stopped


async def test_who_has_a_machine_sees_its_death_before_it_is_cleared_away() -> None:
    way = Way()
    async with running(way, size=1, most=2) as pool:
        async with pool.lease():
            way.made[0].die()
            await asyncio.sleep(0.01)
            assert not way.made[0].stopped
        await settle(pool, 1)
        assert pool.deaths == 1


async def test_a_full_queue_refuses_at_once() -> None:
    way = Way()
    async with running(way, size=1, most=1, queue=2) as pool:
        async with pool.lease():
            waiting = [asyncio.create_task(pool.take()) for _ in range(2)]
            await asyncio.sleep(0.01)
            with pytest.raises(NeverRanError, match="2 requests wait"):
                await pool.take()
        for task in asyncio.as_completed(waiting):
            pool.give_back(await task)


async def test_waiting_has_an_end_and_names_the_problem() -> None:
    way = Way()
    way.failures = [LaunchError("no kernel")] * 1000
    async with running(way, size=1, most=1, queue_wait=0.05) as pool:
        with pytest.raises(NeverRanError, match=r"within 0 s: no kernel"):
            await pool.take()
        assert pool.status()["waiting"] == 0


async def test_a_failed_start_is_tried_again() -> None:
    way = Way()
    way.failures = [LaunchError("once")]
    async with running(way, size=1, most=1) as pool:
        async with pool.lease():
            assert pool.problem is None
        await settle(pool, 1)


async def test_without_memory_nothing_is_started_until_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [100 << 20]
    monkeypatch.setattr("pbotvm_qemu.process.memory_available", lambda: free[0])
    way = Way()
    async with running(way, size=1, most=2, queue_wait=5) as pool:
        await asyncio.sleep(0.03)
        assert not way.made
        assert "no memory for one more machine" in str(pool.problem)
        with pytest.raises(Exception, match="no memory"):
            await pool.ready()
        free[0] = 1 << 40
        async with pool.lease():
            assert pool.problem is None


async def test_callers_take_turns() -> None:
    way = Way()
    served: list[str] = []
    async with running(way, size=1, most=1, queue=100) as pool:

        async def call(caller: str) -> None:
            async with pool.lease(caller=caller):
                served.append(caller)

        async with pool.lease():
            tasks = [asyncio.create_task(call("greedy")) for _ in range(5)]
            await asyncio.sleep(0)
            tasks.append(asyncio.create_task(call("modest")))
            await asyncio.sleep(0.01)
        await asyncio.gather(*tasks)
    assert served.index("modest") == 1


async def test_a_waiting_caller_gets_an_unproved_machine_rather_than_wait() -> None:
    way = Way()
    async with running(way, size=0, most=1) as pool, pool.lease():
        assert way.made[0].proofs == 0


async def test_no_machine_is_lost_when_waiting_is_given_up() -> None:
    way = Way()
    async with running(way, size=1, most=1) as pool:
        async with pool.lease() as lease:
            lease.clean = True
            waiting = asyncio.create_task(pool.take())
            await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await settle(pool, 1)


async def test_a_burst_starts_few_machines_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    way = Way()
    starting = most = 0
    start = way.start

    async def slow() -> Machine:
        nonlocal starting, most
        starting += 1
        most = max(most, starting)
        await asyncio.sleep(0.005)
        starting -= 1
        return await start()

    way.start = slow  # type: ignore[method-assign]
    async with running(way, size=10, most=10) as pool:
        await pool.ready()
    assert most == 2


async def test_an_adopted_machine_counts_and_may_be_refused() -> None:
    way = Way()
    async with running(way, size=1, most=2) as pool:
        await pool.ready()
        lease = await pool.adopt(way, way.start)  # type: ignore[arg-type]
        assert pool.status()["busy"] == 1
        with pytest.raises(NeverRanError, match="2 machines live already"):
            await pool.adopt(way, way.start)  # type: ignore[arg-type]
        pool.give_back(lease)


async def test_draining_refuses_new_and_waiting_callers_and_lets_others_end() -> None:
    way = Way()
    async with running(way, size=1, most=1) as pool:
        lease = await pool.take()
        waiting = asyncio.create_task(pool.take())
        await asyncio.sleep(0.01)
        assert not await pool.drain(0.05)
        with pytest.raises(NeverRanError, match="being stopped"):
            await waiting
        with pytest.raises(NeverRanError, match="being stopped"):
            await pool.take()
        pool.give_back(lease)
        assert await pool.drain(5)


def test_room_leaves_a_tenth_of_the_memory() -> None:
    assert pools.room(512 << 20, 10 * (896 << 20)) == 9
    assert pools.room(512 << 20, 100 << 20) == 0


async def test_a_machine_that_falls_sick_in_the_pool_is_replaced_and_counted_by_reason() -> None:
    way = Way()
    async with running(way, size=1, most=1) as pool:
        await settle(pool, 1)
        way.made[0].sick.set_result("agent-silent")
        while not way.made[0].stopped:
            await asyncio.sleep(0.001)
        assert pool.status()["reverts"] == {"agent-silent": 1}
        async with pool.lease() as lease:
            assert lease.number == 2


def way_of(lease: pools.Lease) -> object:
    return lease.way


async def test_another_way_is_taken_from_the_next_machine_on() -> None:
    old, new = Way(), Way()
    async with running(old, size=1, most=3) as pool:
        await pool.ready()
        async with pool.lease() as lease:
            pool.use(new)  # type: ignore[arg-type]
            await settle(pool, ready=1)
            assert lease.machine.alive
            assert way_of(lease) is old
            async with pool.lease() as second:
                assert way_of(second) is new
        while old.live:
            await asyncio.sleep(0.001)
    assert new.live == 0


async def test_a_machine_that_is_started_while_the_way_changes_is_not_handed_out() -> None:
    old, new = Way(), Way()
    old.gate = asyncio.Event()
    async with running(old, size=1, most=2) as pool:
        pool.use(new)  # type: ignore[arg-type]
        old.gate.set()
        async with pool.lease() as lease:
            assert way_of(lease) is new
        while old.live:
            await asyncio.sleep(0.001)
