"""Clones that wait run the languages that callers use, so that QEMU has translated them when a caller comes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import config, errands, keeper, paths, state
from pbotvm_qemu.languages import SETS
from pbotvm_qemu.pool import Pool
from tests.support import cli

if TYPE_CHECKING:
    from pbotvm_qemu.machine import VirtualMachine
    from pbotvm_qemu.warmth import Warmth

pytestmark = pytest.mark.vm

Env = dict[str, str]
MORE = 1.5  # times as much in a first run as in a second one


async def translated(vm: VirtualMachine) -> int:
    """Return how many blocks of the guest's code this QEMU has translated and still has."""
    said = str(await vm.monitor.execute("human-monitor-command", command_line="info jit"))
    found = re.search(r"TB count +(\d+)", said)
    assert found, said
    return int(found[1])


async def first_and_second(kept: Pool, warmth: Warmth, language: str) -> tuple[int, int]:
    """Return how many blocks the first and the second run of a sample need, in a clone as a caller gets it."""
    async with kept.lease() as lease:
        counts = [await translated(lease.machine)]
        for _ in range(2):
            await errands.warm_up(lease.machine.execute, *warmth.sample(language))
            counts.append(await translated(lease.machine))
    return counts[1] - counts[0], counts[2] - counts[1]


async def ready(kept: Pool, *languages: str) -> None:
    async with asyncio.timeout(120):
        while kept.status()["warm"] != list(languages) or kept.status()["starting"] or kept.status()["busy"]:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("language", SETS["core"])
async def test_the_first_run_in_a_clone_that_waited_is_not_slower_than_the_second(name: str, language: str) -> None:
    """In blocks that QEMU translates, which depend on no clock. Cold, Python needs five times as many."""
    record = state.ready(name)
    loaded = config.load(paths.config_file(), dict(os.environ))
    way = keeper.choose(record, config.override(loaded, "pool", revert="clone"))
    known = keeper.warmth(record, config.override(loaded, "pool", warm=(language,)), way)
    async with Pool(way, size=1, most=2, warmth=known) as kept:
        await ready(kept, language)
        first, second = await first_and_second(kept, known, language)
        assert first <= MORE * second + 1000  # the least that a run takes


def test_a_keeper_follows_what_callers_use(kept_env: Env) -> None:
    def warm() -> object:
        return json.loads(cli(kept_env, "status", "--json").stdout)["live"]["warm"]

    for language, program in (("python3", "print('used')"), ("perl", "print 'used'")):
        assert cli(kept_env, "exec", f"-lang={language}", program).stdout.strip() == b"used"
        until = time.monotonic() + 120
        while (found := warm()) not in ([language], [language, "python3"]):
            assert time.monotonic() < until, found
            time.sleep(0.1)
    assert warm() == ["perl", "python3"]
