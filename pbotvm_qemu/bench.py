"""The figures of this host: every number that the README quotes comes from here.

Figures of one call can be compared with each other; absolute times change from host to host and from hour to hour.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import platform
import statistics
import sys
import time
from typing import TYPE_CHECKING

from pbotvm_qemu import __version__, accel, commands, image, keeper, machine, process, state
from pbotvm_qemu.config import SNAPSHOT, Limits, format_size
from pbotvm_qemu.errors import GuestError
from pbotvm_qemu.guest import spec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pbotvm_qemu.channel import Outcome, Stream
    from pbotvm_qemu.config import Config
    from pbotvm_qemu.plan import Plan

    Say = Callable[[str], None]

_BOOTS = 3  # a boot takes seconds
_BULK = 64 << 20  # bytes printed for the throughput

_UNITS = {
    "boot": "s", "restart": "s", "loadvm": "s", "first_exec": "s", "exec_true": "s", "exec_true_in_guest": "s",
    "ping": "s", "exec_command": "s", "stdout": "MB/s", "pss": "MB",
}  # fmt: skip
_MEANING = {
    "boot": "cold boot to agent ready",
    "restart": "new QEMU with -loadvm 1 to agent ready",
    "loadvm": "snapshot-load in process to agent ready",
    "first_exec": "first run of `true` after a restart",
    "exec_true": "later runs of `true`, request to report",
    "exec_true_in_guest": "the part of that inside the guest",
    "ping": "empty question and answer",
    "exec_command": "`pbotvm-qemu exec -lang=sh true` as a whole, machine kept",
    "stdout": "output of a program, through virtio-serial",
    "pss": "memory of an idle QEMU",
}


async def measure(config: Config, rounds: int, say: Say) -> dict[str, object]:
    """Return medians, 95th percentiles, minima and maxima of every figure, and what host they are of.

    The machine must be stopped. Raises StateError otherwise.
    """
    record = state.ready(config.machine.name)
    samples: dict[str, list[float]] = {name: [] for name in _UNITS}
    async with state.lock(record.name, purpose="bench"):
        warm = keeper.prepare(record, config)
        await _boots(warm, samples, min(rounds, _BOOTS), say)
        await _restarts(warm, samples, rounds, say)
        await _inside(warm, samples, rounds, say)
    await _commands(config, samples, rounds, say)
    return {"host": await _host(record), "figures": {name: _figure(name, values) for name, values in samples.items()}}


async def _boots(plan: Plan, samples: dict[str, list[float]], rounds: int, say: Say) -> None:
    for number in range(rounds):
        say(f"boot {number + 1} of {rounds}")
        async with machine.VirtualMachine(dataclasses.replace(plan, loadvm=None)) as vm:
            samples["boot"].append(vm.ready_s)


async def _restarts(plan: Plan, samples: dict[str, list[float]], rounds: int, say: Say) -> None:
    for number in range(rounds):
        say(f"restart {number + 1} of {rounds}")
        async with machine.VirtualMachine(plan) as vm:
            samples["restart"].append(vm.ready_s)
            if used := process.usage(vm.pid):
                samples["pss"].append(used.pss / 1e6)
            samples["first_exec"].append((await _timed(vm, ("true",)))[0])


async def _inside(plan: Plan, samples: dict[str, list[float]], rounds: int, say: Say) -> None:
    say("exec, ping and output in one machine")
    async with machine.VirtualMachine(plan) as vm:
        for _ in range(3):
            await _timed(vm, ("true",))
        for _ in range(rounds):
            seconds, outcome = await _timed(vm, ("true",))
            samples["exec_true"].append(seconds)
            samples["exec_true_in_guest"].append(outcome.wall_s)
            samples["ping"].append(await vm.channel.ping())
        for _ in range(3):
            seconds, _outcome = await _timed(vm, ("head", "-c", str(_BULK), "/dev/zero"))
            samples["stdout"].append(_BULK / seconds / 1e6)
    for number in range(min(rounds, 5)):
        say(f"loadvm {number + 1}")
        async with machine.VirtualMachine(plan) as vm:
            begin = time.perf_counter()
            try:
                await vm.revert(SNAPSHOT, timeout=15)
            except GuestError as exc:
                say(f"loadvm: {exc}; not counted")
            else:
                samples["loadvm"].append(time.perf_counter() - begin)


async def _commands(config: Config, samples: dict[str, list[float]], rounds: int, say: Say) -> None:
    """Time our own command, from process start to process end, with the machine kept ready."""
    name = config.machine.name
    await commands.start(config, relay=False, arguments=["keep", name])
    try:
        for number in range(rounds):
            say(f"exec command {number + 1} of {rounds}")
            while (await commands.ask(name, {"do": "status"}))["ready"] != 1:
                await asyncio.sleep(0.05)
            begin = time.perf_counter()
            argv = [sys.executable, "-m", "pbotvm_qemu", "exec", "--vm", name, "-lang=sh", "true"]
            (await process.run(argv)).check()
            samples["exec_command"].append(time.perf_counter() - begin)
    finally:
        await commands.stop(name)


async def _timed(vm: machine.VirtualMachine, argv: tuple[str, ...]) -> tuple[float, Outcome]:
    async def ignore(_stream: Stream, _data: bytes) -> None:
        pass

    limits = Limits(wall=120, output=4 * _BULK)
    request = spec.RunSpec(
        files=(),
        steps=(argv,),
        env={},
        stdin=False,
        limits=spec.Limits(limits.wall, limits.cpu, limits.memory, limits.processes, limits.file_size, limits.output),
        collect=(),
    )
    begin = time.perf_counter()
    outcome = await vm.execute(request, [], on_output=ignore)
    return time.perf_counter() - begin, outcome


async def _host(record: state.MachineRecord) -> dict[str, object]:
    version = (await process.run([record.qemu, "--version"])).stdout.decode().splitlines()[0]
    return {
        "pbotvm-qemu": __version__,
        "cpu": accel.cpu_model(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "qemu": version,
        "accelerator": record.accelerator,
        "guest_memory": format_size(record.machine.memory),
        "disk_bytes": image.Image.load(record.image).root.stat().st_size,
    }


def _figure(name: str, values: Sequence[float]) -> dict[str, object]:
    if not values:
        return {"meaning": _MEANING[name], "unit": _UNITS[name], "n": 0}
    ordered = sorted(values)
    return {
        "meaning": _MEANING[name],
        "unit": _UNITS[name],
        "n": len(ordered),
        "median": round(statistics.median(ordered), 5),
        "p95": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))], 5),
        "min": round(ordered[0], 5),
        "max": round(ordered[-1], 5),
    }


def table(report: dict[str, object]) -> list[str]:
    """Return the report as lines for people."""
    host, figures = report["host"], report["figures"]
    assert isinstance(host, dict)
    assert isinstance(figures, dict)
    lines = [f"{key}: {value}" for key, value in host.items()]
    lines += ["", f"{'figure':58} {'unit':>5} {'n':>3} {'median':>9} {'p95':>9} {'min':>9} {'max':>9}"]
    for figure in figures.values():
        numbers = (f"{figure[key]:9.4f}" if figure["n"] else f"{'-':>9}" for key in ("median", "p95", "min", "max"))
        lines.append(f"{figure['meaning']:58} {figure['unit']:>5} {figure['n']:3} {' '.join(numbers)}")
    return lines
