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
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from pbotvm_qemu import (
    __version__,
    accel,
    bench_transports,
    commands,
    control,
    creation,
    image,
    keeper,
    machine,
    process,
    state,
    template,
    ways,
)
from pbotvm_qemu.config import SNAPSHOT, Limits, format_size
from pbotvm_qemu.errors import GuestError
from pbotvm_qemu.guest import spec
from pbotvm_qemu.pool import Pool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from pbotvm_qemu.channel import Outcome, Stream
    from pbotvm_qemu.config import Config
    from pbotvm_qemu.plan import Plan

    Say = Callable[[str], None]
    Samples = dict[str, list[float]]

_BOOTS = 3  # a boot takes seconds
_BULK = 64 << 20  # bytes printed for the throughput
_CALLERS = (1, 2, 4, 8)
_BURST = 6.0  # seconds of runs for each number of callers
_IDLE_CLONES = 4  # that share the template while their memory is measured
_SIZES = (256, 512, 1024, 2048)  # MiB of guest memory
_PATIENCE = 120.0

_FIGURES: dict[str, tuple[str, str]] = {
    "boot": ("s", "cold boot to agent ready"),
    "restart": ("s", "new QEMU with -loadvm 1 to agent ready"),
    "loadvm": ("s", "snapshot-load in process to agent ready"),
    "clone": ("s", "clone, nothing spawned ahead: request to running guest"),
    "clone_spawned": ("s", "clone, QEMU spawned ahead: request to running guest"),
    "clone_ready": ("s", "clone, nothing spawned ahead: request to the agent's answer"),
    "hand_out": ("s", "clone from the pool: request to running guest"),
    "exec_cold": ("s", "first run of `true` in a clone that has run nothing"),
    "exec_pool": ("s", "run of `true` on a clone from the pool, request to report"),
    "first_byte": ("s", "the same with `echo`: request to first byte of output"),
    "exec_true": ("s", "later runs of `true` in one machine, request to report"),
    "exec_true_in_guest": ("s", "the part of that inside the guest"),
    "ping": ("s", "empty question and answer"),
    "exec_command": ("s", "`pbotvm-qemu exec -lang=sh true` as a whole, machine kept"),
    "stdout": ("MB/s", "output of a program, through virtio-serial"),
    "pss": ("MB", f"memory of an idle clone among {_IDLE_CLONES} (PSS)"),
    "pss_own": ("MB", "the part of that which is its own"),
    **{f"runs_{n}": ("/s", f"runs of `true`, each on a fresh clone, {n} callers") for n in _CALLERS},
    "busy_share": ("", "runs a second x processor time of one / processors, most callers"),
}
_GROWTH = {f"clone_{size}": ("s", f"clone of a guest with {size} MiB: request to running guest") for size in _SIZES}
_VIRSH = {"virsh_revert": ("s", "`virsh snapshot-revert` of the domain that was named")}


async def measure(
    config: Config, rounds: int, say: Say, *, growth: bool = False, domain: str | None = None
) -> dict[str, object]:
    """Return medians, 95th percentiles, minima and maxima of every figure, and what host they are of.

    `growth` also makes machines of several memory sizes, and takes minutes. `domain` is a libvirt domain with a
    snapshot called 1 to compare with. The machine must be stopped. Raises StateError otherwise.
    """
    record = state.ready(config.machine.name)
    samples: Samples = {name: [] for name in _FIGURES | bench_transports.FIGURES}
    async with state.lock(record.name, purpose="bench"):
        warm = keeper.prepare(record, config)
        source = template.matching(record.name, record.fingerprint)
        way = ways.Clone(warm, source, why="bench")
        await _boots(warm, samples, min(rounds, _BOOTS), say)
        await _restarts(warm, samples, rounds, say)
        await _clones(way, samples, rounds, say)
        await _pool(way, samples, rounds, say)
        await _inside(way, samples, rounds, say)
        await bench_transports.measure(config, record, samples, say)
        await _loadvms(warm, samples, min(rounds, 5), say)
        await _bursts(way, samples, say)
    await _commands(config, samples, rounds, say)
    if growth:
        await _growth(config, record, samples, rounds, say)
    if domain:
        await _virsh(domain, samples, min(rounds, 5), say)
    about = _FIGURES | bench_transports.FIGURES | _GROWTH | _VIRSH
    return {
        "host": await _host(record),
        "figures": {name: _figure(*about[name], values) for name, values in samples.items()},
        "ratios": _ratios(samples),
    }


async def _boots(plan: Plan, samples: Samples, rounds: int, say: Say) -> None:
    for number in range(rounds):
        say(f"boot {number + 1} of {rounds}")
        async with machine.VirtualMachine(dataclasses.replace(plan, loadvm=None)) as vm:
            samples["boot"].append(vm.ready_s)


async def _restarts(plan: Plan, samples: Samples, rounds: int, say: Say) -> None:
    for number in range(rounds):
        say(f"restart {number + 1} of {rounds}")
        async with machine.VirtualMachine(plan) as vm:
            samples["restart"].append(vm.ready_s)


async def _clones(way: ways.Clone, samples: Samples, rounds: int, say: Say) -> None:
    say(f"{rounds} clones, one after another")
    for _ in range(rounds):
        async with _clone(way) as vm:
            samples["clone"].append(vm.running_s)
            samples["clone_spawned"].append(vm.running_s - vm.spawned_s)
            samples["clone_ready"].append(vm.ready_s)
            samples["exec_cold"].append((await _timed(vm, ("true",)))[0])


async def _pool(way: ways.Clone, samples: Samples, rounds: int, say: Say) -> None:
    say("clones from a pool")
    async with Pool(way, size=_IDLE_CLONES, most=2 * _IDLE_CLONES) as pool:
        await pool.ready()
        for vm in pool.machines:
            if used := process.usage(vm.pid):
                samples["pss"].append(used.pss / 1e6)
                samples["pss_own"].append(used.uss / 1e6)
        for _ in range(rounds):
            await pool.ready()
            begin = time.perf_counter()
            async with pool.lease() as lease:
                samples["hand_out"].append(time.perf_counter() - begin)
                await _timed(lease.machine, ("true",))
                samples["exec_pool"].append(time.perf_counter() - begin)
            await pool.ready()
            begin = time.perf_counter()
            async with pool.lease() as lease:
                samples["first_byte"].append(await _first_byte(lease.machine, begin))


async def _first_byte(vm: machine.VirtualMachine, begin: float) -> float:
    seen: list[float] = []

    async def note(_stream: Stream, _data: bytes) -> None:
        seen.append(time.perf_counter() - begin)

    await vm.execute(_request(("echo", "x")), [], on_output=note)
    return seen[0]


async def _inside(way: ways.Clone, samples: Samples, rounds: int, say: Say) -> None:
    say("runs, pings and output in one clone")
    async with _clone(way) as vm:
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


async def _loadvms(plan: Plan, samples: Samples, rounds: int, say: Say) -> None:
    for number in range(rounds):
        say(f"loadvm {number + 1} of {rounds}")
        async with machine.VirtualMachine(plan) as vm:
            begin = time.perf_counter()
            try:
                await vm.revert(SNAPSHOT, timeout=15)
            except GuestError as exc:
                say(f"loadvm: {exc}; not counted")
            else:
                samples["loadvm"].append(time.perf_counter() - begin)


async def _bursts(way: ways.Clone, samples: Samples, say: Say) -> None:
    """Have callers run one program after another for a while, each on a fresh clone."""
    processors = os.cpu_count() or 1
    for callers in _CALLERS:
        say(f"runs a second with {callers} callers")
        cpu = process.children_cpu()
        async with Pool(way, size=2, most=2 + 2 * processors, queue=100, queue_wait=_PATIENCE) as pool:
            await pool.ready()
            begin = time.perf_counter()
            before = pool.runs

            async def call(until: float, pool: Pool = pool) -> None:
                while time.perf_counter() < until:
                    await pool.run(_request(("true",)), [], on_output=_ignore)

            await asyncio.gather(*(call(begin + _BURST) for _ in range(callers)))
            seconds = time.perf_counter() - begin
            done = pool.runs - before
            started = pool.starts
        samples[f"runs_{callers}"].append(done / seconds)
        if callers == _CALLERS[-1]:
            each = (process.children_cpu() - cpu) / started
            samples["busy_share"].append(done / seconds * each / processors)


async def _commands(config: Config, samples: Samples, rounds: int, say: Say) -> None:
    """Time our own command, from process start to process end, with the machine kept ready."""
    name = config.machine.name
    say(f"{rounds} exec commands")
    await commands.start(config, relay=False, arguments=["keep", name])
    try:
        for _ in range(rounds):
            while (await control.ask(name, {"do": "status"}))["ready"] == 0:
                await asyncio.sleep(0.05)
            begin = time.perf_counter()
            argv = [sys.executable, "-m", "pbotvm_qemu", "exec", "--vm", name, "-lang=sh", "true"]
            (await process.run(argv)).check()
            samples["exec_command"].append(time.perf_counter() - begin)
    finally:
        await commands.stop(name)


async def _growth(config: Config, record: state.MachineRecord, samples: Samples, rounds: int, say: Say) -> None:
    """Make a machine of each memory size from the same image, clone it, and remove it."""
    built = image.Image.load(record.image)
    for size in _SIZES:
        say(f"clones of a guest with {size} MiB")
        name = f"{record.name[:28]}-bench-{size}"
        hardware = dataclasses.replace(record.machine, name=name, memory=size << 20, serial=0, health=0)
        samples[f"clone_{size}"] = times = []
        async with state.lock(name, purpose="bench"):
            try:
                made = await creation.make(
                    dataclasses.replace(config, machine=hardware),
                    built,
                    record.qemu,
                    record.accelerator,
                    (),
                    lambda _stage, _done: None,
                )
                source = template.matching(name, made.fingerprint)
                way = ways.Clone(keeper.prepare(made, config), source, why="bench")
                for _ in range(rounds):
                    async with _clone(way) as vm:
                        times.append(vm.running_s)
            finally:
                state.discard(name)
        state.forget_lock(name)


async def _virsh(domain: str, samples: Samples, rounds: int, say: Say) -> None:
    say(f"virsh snapshot-revert {domain} 1")
    virsh = process.find_program("virsh", package="libvirt-clients")
    samples["virsh_revert"] = times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        (await process.run([virsh, "snapshot-revert", domain, "1", "--running"])).check()
        times.append(time.perf_counter() - begin)


def _ratios(samples: Samples) -> dict[str, float]:
    """Return how many times longer other ways take than a clone, and how its cost grows."""
    found: dict[str, float] = {}
    clone = _median(samples["clone"])
    for name in ("boot", "restart", "loadvm", "virsh_revert"):
        if samples.get(name) and clone:
            found[f"{name} / clone"] = round(_median(samples[name]) / clone, 1)
    if samples.get("clone_2048") and samples.get("clone_512"):
        found["clone at 2048 MiB / at 512 MiB"] = round(
            _median(samples["clone_2048"]) / _median(samples["clone_512"]), 2
        )
    return found


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


@asynccontextmanager
async def _clone(way: ways.Clone) -> AsyncIterator[machine.VirtualMachine]:
    vm = await way.start()
    try:
        yield vm
    finally:
        await vm.stop()


def _request(argv: tuple[str, ...]) -> spec.RunSpec:
    limits = Limits(wall=_PATIENCE, output=4 * _BULK)
    return spec.RunSpec(
        files=(),
        steps=(argv,),
        env={},
        stdin=False,
        limits=spec.Limits(limits.wall, limits.cpu, limits.memory, limits.processes, limits.file_size, limits.output),
        collect=(),
    )


async def _ignore(_stream: Stream, _data: bytes) -> None:
    pass


async def _timed(vm: machine.VirtualMachine, argv: tuple[str, ...]) -> tuple[float, Outcome]:
    begin = time.perf_counter()
    outcome = await vm.execute(_request(argv), [], on_output=_ignore)
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


def _figure(unit: str, meaning: str, values: Sequence[float]) -> dict[str, object]:
    if not values:
        return {"meaning": meaning, "unit": unit, "n": 0}
    ordered = sorted(values)
    return {
        "meaning": meaning,
        "unit": unit,
        "n": len(ordered),
        "median": round(statistics.median(ordered), 5),
        "p95": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))], 5),
        "min": round(ordered[0], 5),
        "max": round(ordered[-1], 5),
    }


def table(report: dict[str, object]) -> list[str]:
    """Return the report as lines for people."""
    host, figures, ratios = report["host"], report["figures"], report["ratios"]
    assert isinstance(host, dict)
    assert isinstance(figures, dict)
    assert isinstance(ratios, dict)
    lines = [f"{key}: {value}" for key, value in host.items()]
    lines += ["", f"{'figure':66} {'unit':>5} {'n':>3} {'median':>9} {'p95':>9} {'min':>9} {'max':>9}"]
    for figure in figures.values():
        numbers = (f"{figure[key]:9.4f}" if figure["n"] else f"{'-':>9}" for key in ("median", "p95", "min", "max"))
        lines.append(f"{figure['meaning']:66} {figure['unit']:>5} {figure['n']:3} {' '.join(numbers)}")
    return [*lines, "", *(f"{name}: {value:g}" for name, value in ratios.items())]
