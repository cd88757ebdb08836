"""The pool with machines that only pretend: who gets one, when, and what happens to those that die."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from pbotvm_qemu import pool as pools
from pbotvm_qemu.channel import Hello, Outcome
from pbotvm_qemu.config import MachineConfig
from pbotvm_qemu.errors import GuestError, LaunchError, MonitorError, NeverRanError, RunLostError
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


def program(language: str) -> RunSpec:
    return pools._PROOF._replace(language=language)


def warmth(*always: str, recent: int = 2) -> Warmth:
    return Warmth({name: (program(name), []) for name in ("sh", "python3", "c11")}, always=always, recent=recent)


async def use(pool: Pool, language: str) -> None:
    await pool.run(program(language), [], on_output=pools._ignore)


async def warm(pool: Pool, *languages: str) -> None:
    while pool._warming or pool._starting or pool.busy or pool.status()["warm"] != list(languages):
        await asyncio.sleep(0.001)


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
