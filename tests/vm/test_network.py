"""Who reaches whom: real guests, real traffic, in network namespaces made for it.

The guests run their programs as root, as an attacker does who has taken over his guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import creation, image, paths, template
from pbotvm_qemu.config import Config, MachineConfig, NetworkConfig
from pbotvm_qemu.errors import GuestError
from pbotvm_qemu.machine import VirtualMachine
from pbotvm_qemu.network import bridgehelper, dhcp, links, managers, netfilter, netsetup
from pbotvm_qemu.plan import Console, Plan
from tests import guest_programs, lab, support

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

    from pbotvm_qemu.network.addresses import NetworkName

pytestmark = [pytest.mark.vm, pytest.mark.netns]

SETTINGS = NetworkConfig(rate=0, dns=("45.45.45.1",))
NAME = "net-root"


@dataclass(frozen=True)
class Source:
    """A machine with a network card, whose programs run as root: what guests are made from."""

    cold: Plan
    built: image.Image
    frozen: template.Template


@pytest.fixture(scope="module")
async def machine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Source]:
    """Such a machine, made once for this file."""
    if reason := lab.missing() or support.missing_for_vm():
        pytest.skip(reason)
    recipes = tmp_path_factory.mktemp("recipes") / "images"
    shutil.copytree(paths.recipes(), recipes)
    start = recipes / "initramfs/start"
    start.write_text(start.read_text().replace("user=vm home=/home/vm", "user=root home=/home/vm"))
    for env in support.environment(NAME):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            patch.setattr(paths, "recipes", lambda: recipes)
            hardware = MachineConfig(name=NAME, serial=0, health=0, cid=0, net="nat")
            record = await creation.create(Config(machine=hardware), "core", lambda _stage, _done: None)
            built = image.Image.load(record.image)
            yield Source(Plan.of(record, built, loadvm=None), built, template.matching(record.name, record.fingerprint))


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[lab.Lab]:
    """A host and a world; this test runs in the host, whose real network managers are none of our business."""
    monkeypatch.setattr(managers, "FILES", ())
    with lab.lab() as made, lab.inside(made.host):
        yield made


async def bring_up(settings: NetworkConfig, networks: Sequence[NetworkName] = netsetup.OWN) -> None:
    async with links.Links() as kernel:
        for step in netsetup.up(kernel, await netsetup.look(kernel), settings, networks):
            await step.do()


async def take_down() -> None:
    async with links.Links() as kernel:
        for step in netsetup.down(kernel, await netsetup.look(kernel), netsetup.OWN):
            await step.do()


async def bridge(network: lab.Lab) -> NetworkConfig:
    """Put the host's uplink into a bridge of the host's own, and return what guests need to be there."""
    network.ip("link", "add", "br-lan", "type", "bridge")
    network.ip("addr", "flush", "dev", "lan0", "scope", "global")
    network.ip("link", "set", "lan0", "master", "br-lan")
    network.ip("link", "set", "br-lan", "up")
    for where in (f"{lab.HOST4}/24", f"{lab.HOST6}/64"):
        network.ip("addr", "add", where, "dev", "br-lan", *(["nodad"] if ":" in where else []))
    settings = replace(
        SETTINGS, bridge="br-lan", addresses=("45.45.45.100-45.45.45.150/24", "2a00:45::100-2a00:45::200/64"),
        gateways=(lab.WORLD["outside4"], lab.WORLD["outside6"]),
    )  # fmt: skip
    await bring_up(settings, ())
    return settings


@contextlib.asynccontextmanager
async def guests(
    source: Source, mode: str, settings: NetworkConfig, *names: str
) -> AsyncIterator[Sequence[VirtualMachine]]:
    """Start one clone for each of `names`, in the network of `mode`."""
    plan = source.cold.restored(source.frozen.memory)
    plan = replace(plan, config=replace(plan.config, net=mode), network=settings)
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(VirtualMachine(plan, thaw=source.frozen.frozen, hostname=name))
            for name in names
        ]


@contextlib.asynccontextmanager
async def booted(source: Source, mode: str, *, cpus: int = 1) -> AsyncIterator[VirtualMachine]:
    """Boot a guest of `mode`, which has other hardware than the clones."""
    files = paths.MachinePaths(mode)
    for folder in (files.directory, files.runtime):
        folder.mkdir(parents=True, exist_ok=True, mode=0o711)
    await image.create_overlay(source.built, files.disk, source.cold.config.disk_size)
    plan = replace(
        source.cold, config=replace(source.cold.config, name=mode, net=mode, cpus=cpus), network=SETTINGS,
        disk=files.disk, console=Console(files.console_socket, files.console_log),
    )  # fmt: skip
    async with VirtualMachine(plan) as vm:
        yield vm


KINDS = ("tcp", "udp", "icmp")
SIZE = 4 << 20  # bytes
CLONES = 24
HOST = {"host4": lab.HOST4, "host6": lab.HOST6}


def outside() -> dict[str, str]:
    return {name: where for name, where in lab.WORLD.items() if name.startswith("outside")}


def inland() -> dict[str, str]:
    """Private networks and the addresses of metadata services."""
    return {name: where for name, where in lab.WORLD.items() if not name.startswith("outside")}


def address(vm: VirtualMachine, version: int) -> str:
    assert vm.attachment.guest
    return next(str(item) for item in vm.attachment.guest.plain if item.version == version)


def gateway(vm: VirtualMachine, version: int) -> str:
    assert vm.attachment.guest
    return next(item for item in vm.attachment.guest.gateways if (":" in item) == (version == 6))


def neighbour(vm: VirtualMachine) -> dict[str, str]:
    return {"other4": address(vm, 4), "other6": address(vm, 6)}


def targets(places: dict[str, str], *kinds: str) -> dict[str, tuple[str, str, int]]:
    return {f"{name} {kind}": (kind, where, lab.PORT) for name, where in places.items() for kind in kinds}


async def assert_reaches(
    vm: VirtualMachine, tried: dict[str, tuple[str, str, int]], wanted: Iterable[str], *, wait: float = 3.0
) -> None:
    """Hold that of what is `tried` the guest reaches what is `wanted`, and nothing else."""
    assert await lab.reached(vm, tried, wanted, wait=wait) == set(wanted)


def asked(port: int, *, udp: bool = False) -> str:
    """Return what answers on `port` of the host's loopback."""
    kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.settimeout(lab.PATIENCE)
        sock.connect(("127.0.0.1", port))
        sock.sendall(b"hello" if udp else b"echo hello\n")
        answer: bytes = sock.recv(100)
        return answer.decode().strip()


def reached_from(where: str, target: str, port: int = lab.PORT, *, within: float = lab.PATIENCE) -> bool:
    """Tell whether namespace `where` reaches `target` over TCP."""
    with (
        lab.inside(where),
        contextlib.suppress(OSError),
        socket.create_connection((target, port), timeout=within) as sock,
    ):
        sock.settimeout(within)
        sock.sendall(b"echo hello\n")
        return sock.recv(100).startswith(b"hello from ")
    return False


@contextlib.contextmanager
def sniffer(interface: str) -> Iterator[Callable[[], list[bytes]]]:
    """Hear every frame on `interface`; the function that is yielded returns those that came since."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind((interface, 0))
        sock.setblocking(False)

        def heard() -> list[bytes]:
            frames = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    frames.append(sock.recv(4096))
            return frames

        yield heard


async def command(vm: VirtualMachine, text: str) -> str:
    """Run a command of the guest as root, and return what it printed."""
    return await lab.run_in(vm, f"import subprocess; print(subprocess.check_output({text.split()}, text=True))")


@contextlib.asynccontextmanager
async def serving(vm: VirtualMachine) -> AsyncIterator[None]:
    """Have the guest echo on lab.PORT while the body runs."""
    code = (Path(lab.__file__).parent / "lab_server.py").read_text()
    code = code.replace("sys.argv[1:]", repr([f"0.0.0.0,{lab.PORT}", f"::,{lab.PORT}"]))
    ready = asyncio.Event()

    async def heard(_stream: object, data: bytes) -> None:
        if b"ready" in data:
            ready.set()

    task = asyncio.create_task(lab.execute(vm, code, heard))
    try:
        await asyncio.wait_for(ready.wait(), lab.PATIENCE)
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_who_reaches_whom_through_nat(machine: Source, network: lab.Lab) -> None:
    await bring_up(SETTINGS)
    async with guests(machine, "nat", SETTINGS, "a", "b") as (one, two), serving(two):
        world = outside()
        near = inland() | neighbour(two) | HOST
        near |= {"gateway4": gateway(one, 4), "gateway6": gateway(one, 6)}
        await assert_reaches(one, targets(world | near, *KINDS), targets(world, *KINDS))
        # What listens on the host's loopback is not reached at any of the host's addresses, nor by sending there.
        doors = {"gateway": gateway(one, 4), "host": lab.HOST4, "loopback": "127.0.0.1"}
        await assert_reaches(one, {name: ("tcp", where, lab.LOOPBACK_PORT) for name, where in doors.items()}, ())


@pytest.mark.parametrize("peers", [False, True])
async def test_isolated_guests_reach_each_other_or_nobody(machine: Source, network: lab.Lab, peers: bool) -> None:
    settings = replace(SETTINGS, peers=peers)
    await bring_up(settings)
    # Even a host that gives itself an address in there stays out of reach.
    network.ip("addr", "add", "10.213.208.1/20", "dev", "pbot-iso0")
    async with guests(machine, "isolated", settings, "a", "b") as (one, two), serving(two):
        far = outside() | inland() | HOST | {"bridge4": "10.213.208.1"}
        wanted = targets(neighbour(two), *KINDS) if peers else {}
        await assert_reaches(one, targets(far | neighbour(two), *KINDS), wanted)


async def test_bridged_guests_reach_the_network_behind_the_bridge(machine: Source, network: lab.Lab) -> None:
    settings = await bridge(network)
    async with guests(machine, "bridge", settings, "a", "b") as (one, two), serving(two):
        tried = targets(outside() | inland() | neighbour(two) | HOST, *KINDS)
        await assert_reaches(one, tried, targets(outside(), *KINDS))
        # The network behind the bridge reaches the guest, as it would any other host there.
        assert reached_from(network.world, address(two, 4))
        assert reached_from(network.world, address(two, 6))
        await bring_up(replace(settings, allow=(f"{lab.HOST4}:{lab.PORT}/tcp",)), ())
        await assert_reaches(one, targets(HOST, *KINDS), {"host4 tcp"})


async def test_user_mode_reaches_what_its_user_reaches(machine: Source, network: lab.Lab) -> None:
    del network
    async with booted(machine, "user") as one:
        near = {name: where for name, where in (outside() | inland() | HOST).items() if name.endswith("4")}
        tried = targets(near, "tcp", "udp") | {"loopback tcp": ("tcp", "10.0.2.2", lab.LOOPBACK_PORT)}
        # QEMU speaks for the guest as its own user: there is no policy here, which is what the documents say.
        await assert_reaches(one, tried, tried)
        await assert_reaches(one, targets(outside(), "tcp"), targets(outside(), "tcp"))


async def test_without_a_network_there_is_no_card(machine: Source, network: lab.Lab) -> None:
    del network
    async with booted(machine, "none") as one:
        assert (await lab.run_in(one, "import os; print(os.listdir('/sys/class/net'))")).strip() == "['lo']"
        await assert_reaches(one, targets(outside() | inland() | HOST, *KINDS), ())
        with pytest.raises(GuestError, match="refused"):
            await one.set_network(on=False)


async def test_a_card_with_two_queues_uses_both(machine: Source, network: lab.Lab) -> None:
    await bring_up(SETTINGS)
    async with booted(machine, "nat", cpus=2) as one:
        assert one.attachment.guest
        link = json.loads(network.ip("-j", "-d", "link", "show", one.attachment.guest.tap))[0]
        assert link["linkinfo"]["info_data"]["multi_queue"] is True
        found = json.loads(await lab.run_in(one, guest_programs.QUEUES % lab.WORLD["outside4"]))
        assert (found["rx"], found["tx"], found["channels"]) == (2, 2, {"most": 2, "used": 2})
        first, second = found["talks"]
        assert first["0"] > 0
        assert second["1"] > 0
        world = targets(outside(), *KINDS)
        await assert_reaches(one, world, world)


async def test_a_running_guest_gets_another_policy(machine: Source, network: lab.Lab) -> None:
    await bring_up(SETTINGS)
    async with guests(machine, "nat", SETTINGS, "a") as (one,):
        near = {"private4": lab.WORLD["private4"], "private6": lab.WORLD["private6"], "outside4": lab.WORLD["outside4"]}
        near |= {"gateway4": gateway(one, 4)}
        everything = targets(near, "tcp", "udp")
        await assert_reaches(one, everything, {"outside4 tcp", "outside4 udp"})
        private = replace(SETTINGS, allow=(f"10.99.0.0/16:{lab.PORT}/tcp", "[fc99::/32]:7000-8000/udp"))
        await bring_up(private)
        await assert_reaches(one, everything, {"outside4 tcp", "outside4 udp", "private4 tcp", "private6 udp"})
        await bring_up(replace(private, egress="listed"))
        await assert_reaches(one, everything, {"private4 tcp", "private6 udp"})
        # Every address with that port is not this host; naming the host is.
        await bring_up(replace(SETTINGS, allow=(f"0.0.0.0/0:{lab.PORT}/tcp",)))
        await assert_reaches(one, everything, {"outside4 tcp", "outside4 udp", "private4 tcp"})
        await bring_up(replace(SETTINGS, allow=(f"{gateway(one, 4)}:{lab.PORT}/tcp",)))
        await assert_reaches(one, everything, {"outside4 tcp", "outside4 udp", "gateway4 tcp"})
        # Another policy for this machine alone.
        await bring_up(replace(SETTINGS, machines={NAME: {"allow": ("10.99.0.1",), "egress": "listed"}}))
        await assert_reaches(one, everything, {"private4 tcp", "private4 udp"})


async def test_a_narrower_policy_cuts_open_connections(machine: Source, network: lab.Lab) -> None:
    del network
    await bring_up(SETTINGS)
    async with guests(machine, "nat", SETTINGS, "a") as (one,):
        printed = bytearray()

        async def heard(_stream: object, data: bytes) -> None:
            printed.extend(data)

        program = guest_programs.KEEP_TALKING % lab.WORLD["outside4"]
        talk = asyncio.create_task(lab.execute(one, program, heard))
        await lab.eventually(lambda: b"talking" in printed)
        await bring_up(replace(SETTINGS, egress="listed"))
        assert (await asyncio.wait_for(talk, lab.PATIENCE * 2)).exit_code == 0
        assert printed.split() == [b"talking", b"cut"]


async def test_large_transfers_arrive_whole(machine: Source, network: lab.Lab) -> None:
    del network
    await bring_up(SETTINGS)
    async with guests(machine, "nat", SETTINGS, "a") as (one,):
        for where in (lab.WORLD["outside4"], lab.WORLD["outside6"]):
            size = 100 << 20 if "." in where else 10 << 20
            printed = (await lab.run_in(one, guest_programs.TRANSFER % (where, size), timeout=900)).split()
            expected = hashlib.sha256(bytes(range(256)) * (size // 256)).hexdigest()
            assert printed == [expected, expected]


async def test_limits_hold(machine: Source, network: lab.Lab) -> None:
    del network
    settings = replace(SETTINGS, connections=8)
    await bring_up(settings)
    async with guests(machine, "nat", settings, "a") as (one,):
        assert int(await lab.run_in(one, guest_programs.MANY % lab.WORLD["outside4"])) == 8
        rate = 1 << 19
        await bring_up(replace(settings, rate=rate))
        # The kernel lets a second's worth beside the burst through at once, which a fetch of more than both uses up.
        await lab.run_in(one, guest_programs.FETCH % (lab.WORLD["outside4"], 2 * rate + 2 * netfilter.BURST_MIN))
        # Not how fast this host is, but what the limit lets through: it may let some through at once (its burst).
        # Taken by the host's clock; that of an emulated guest on a busy host is late.
        begin = time.monotonic()
        await lab.run_in(one, guest_programs.FETCH % (lab.WORLD["outside4"], SIZE))
        assert time.monotonic() - begin > (SIZE - 2 * netfilter.BURST_MIN) / rate


async def test_ports_of_the_loopback_lead_to_the_guest(machine: Source, network: lab.Lab) -> None:
    settings = replace(SETTINGS, forward=(f"18080:{lab.PORT}", f"15353:{lab.PORT}/udp"))
    await bring_up(settings)
    async with guests(machine, "nat", settings, "a", "b") as (one, two):
        async with serving(one):
            assert asked(18080) == f"hello from {gateway(one, 4)}"
            assert asked(15353, udp=True) == "hello"
            # From another host they lead nowhere, whatever address they are tried at.
            assert not reached_from(network.world, lab.HOST4, 18080, within=3.0)
        async with serving(two):  # it began a program last
            assert asked(18080) == f"hello from {gateway(two, 4)}"
    assert (await netfilter.contents()).elements == ()


async def test_the_network_is_switched_off_and_on(machine: Source, network: lab.Lab) -> None:
    del network
    await bring_up(SETTINGS)
    one_target = targets({"outside4": lab.WORLD["outside4"]}, "tcp")
    async with guests(machine, "nat", SETTINGS, "a") as (one,):
        # At once: a card that was never in use before must not lose its carrier by that.
        await one.set_network(on=False)
        await one.set_network(on=True)
        await assert_reaches(one, one_target, one_target)
        for off, on in (
            (lambda: command(one, "network off"), lambda: command(one, "network on")),
            (lambda: one.set_network(on=False), lambda: one.set_network(on=True)),
        ):
            await off()
            assert (await command(one, "network status")).strip() == "off"
            await assert_reaches(one, one_target, (), wait=1.0)
            await on()
            assert (await command(one, "network status")).strip() == "on"
            await assert_reaches(one, one_target, one_target)


async def test_a_guest_without_an_agent_asks_for_its_address(machine: Source, network: lab.Lab) -> None:
    settings = replace(SETTINGS, dhcp=True)
    await bring_up(settings)
    try:
        async with guests(machine, "nat", settings, "a") as (one,):
            await one.set_network(on=False)
            # What it gets is what it may have: from there on it reaches the world as any other guest.
            said = await lab.run_in(one, guest_programs.LEASE)
            assert said.split() == [address(one, 4), gateway(one, 4), "45.45.45.1", "1500"]
            tried = targets({"outside4": lab.WORLD["outside4"]}, *KINDS)
            await assert_reaches(one, tried, tried)
            # With another MAC it is nobody.
            assert (await lab.run_in(one, guest_programs.LEASE_OF_STRANGER)).startswith("nothing")
    finally:
        await take_down()
    assert not dhcp.left()
    assert dhcp.running() is None
    assert ":67 " not in network.run("ss", "-lun")


async def test_nothing_forged_leaves_a_guest(machine: Source, network: lab.Lab) -> None:
    settings = await bridge(network)
    settings = replace(settings, peers=True, forward=("18080:7777",))  # so that the bridge takes the loopback network
    await bring_up(settings)
    for mode, where in (("nat", "pbot-nat0"), ("isolated", "pbot-iso0"), ("bridge", "br-lan")):
        async with guests(machine, mode, settings, "a", "b") as (one, two):
            me, other = one.attachment.guest, two.attachment.guest
            assert me
            assert other
            told = {
                "mac": me.mac, "ip": address(one, 4), "six": address(one, 6), "local": str(me.link_local),
                "other_mac": other.mac, "other_ip": address(two, 4), "other_six": address(two, 6),
                "gateway": me.gateways[0] if me.gateways else address(two, 4),
                "gateway6": me.gateways[1] if me.gateways else address(two, 6),
            }  # fmt: skip
            with contextlib.ExitStack() as stack:
                places = [where, other.tap, "lan0"]
                ears = [stack.enter_context(sniffer(name)) for name in places]
                names = json.loads(await lab.run_in(one, guest_programs.forgery(told)))
                honest = {name for name in names if name.startswith("honest")}
                assert len(names) > 20
                heard: set[str] = set()
                # Each honest frame is seen by somebody: so the ears hear, and the forger can speak. The last frame
                # of all is an honest one; what is behind it was on its way before it.
                until = time.monotonic() + lab.PATIENCE
                while not honest <= heard and time.monotonic() < until:
                    await asyncio.sleep(0.5)
                    heard |= {
                        match.decode()
                        for ear in ears
                        for frame in ear()
                        for match in re.findall(rb"FORGED-([a-z0-9-]+)!", frame)
                    }
            assert heard == honest, f"mode {mode}"


async def test_clones_that_come_and_go_leave_nothing(machine: Source, network: lab.Lab) -> None:
    await bring_up(SETTINGS)
    before = lab.dump(network.host)

    async def come_and_go(number: int) -> None:
        async with guests(machine, "nat" if number % 3 else "isolated", SETTINGS, f"g{number}") as (one,):
            assert one.attachment.guest
            if number % 4 == 0:  # this one does not end in peace
                os.kill(one.pid, signal.SIGKILL)

    for number in range(0, CLONES, 4):
        await asyncio.gather(*(come_and_go(number + more) for more in range(4)))
    lab.assert_same(network.host, before)


def narrowed(env: dict[str, str]) -> None:
    """Narrow the policy of a machine that is kept: what runs and what is started later have the new one.

    Everything is called from this thread, which is in the right namespace.
    """
    words = ("exec", "--timeout=60", "-lang=python3", ASK_WORLD.replace("timeout=60", "timeout=3"))
    done = support.cli(env, *words)
    assert done.returncode == 0, done.stderr.decode()
    file = paths.config_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'[network.machines.{NAME}]\negress = "listed"\n')
    unmanaged = "for name in systemd NetworkManager; do test ! -d /run/$name || mount -t tmpfs none /run/$name; done"
    subprocess.run(
        ["unshare", "-m", "sh", "-ec", f'{unmanaged}; exec "$@"', "sh", *support.PROGRAM, "net", "up"],
        env=env, check=True, timeout=support.LONG,
    )  # fmt: skip
    for _ in range(3):  # more than there are clones ready
        done = support.cli(env, *words)
        assert (done.returncode, b"TimeoutError" in done.stderr) == (1, True), done.stderr.decode()
    file.unlink()


async def test_a_killed_keeper_leaves_rules_that_prune_removes(machine: Source, network: lab.Lab) -> None:
    del machine
    await bring_up(NetworkConfig())
    before = (await netfilter.contents()).chains
    env = dict(os.environ)
    started = support.cli(env, "start")
    assert started.returncode == 0, started.stderr.decode()
    narrowed(env)
    assert "pbtn" in network.ip("-o", "link")
    os.kill(support.cli_json(env, "status", "--json")["pid"], signal.SIGKILL)
    await lab.eventually(lambda: "pbtn" not in network.ip("-o", "link"))
    assert (await netfilter.contents()).guests
    found = [item["what"] for item in support.cli_json(env, "prune", "--json")["left"] if item["kind"] == "network"]
    assert len(found) == 1
    assert found[0].startswith("remove the rules of pbtn")
    assert (await netfilter.contents()).chains == before
    assert (await netfilter.contents()).elements == ()


# as an ordinary user -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ordinary(machine: Source, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[str]]]:
    """What `nobody` types, in a mount namespace with a bridge.conf and a helper of its own; a function of the words."""
    python = support.python_for("nobody")
    if python is None:
        pytest.skip("user nobody can run no Python 3.11 with our packages")
    helper, acl = bridgehelper.HELPERS[0], bridgehelper.ACLS[0]
    if not helper.is_file():
        pytest.skip(f"{helper} is not installed")
    made = [] if acl.parent.is_dir() else [acl.parent]
    for folder in made:
        folder.mkdir()
    base = Path(tempfile.mkdtemp(prefix="pbotvm-user-", dir="/var/tmp"))
    files = paths.MachinePaths(NAME)
    mine = base / "data/pbotvm-qemu/machines" / NAME
    mine.mkdir(parents=True)
    for name in ("disk.qcow2", "initramfs.cpio"):
        subprocess.run(["cp", "--sparse=always", files.directory / name, mine / name], check=True)
    record = json.loads(files.record.read_text())
    record["machine"]["net"] = "bridge"
    (mine / "machine.json").write_text(json.dumps(record))
    (base / "config/pbotvm-qemu").mkdir(parents=True)
    (base / "config/pbotvm-qemu/config.toml").write_text(ORDINARY)
    (base / "run").mkdir()
    (base / "helper").write_bytes(helper.read_bytes())
    subprocess.run(["chown", "-R", "nobody:nogroup", base], check=True)
    os.mknod(base / "tun", 0o600 | stat.S_IFCHR, os.makedev(10, 200))
    env = support.places(base) | {"PYTHONPATH": support.packages(), "XDG_CACHE_HOME": "/var/cache", "HOME": str(base)}

    def typed(*words: str, setuid: bool, conf: str, tun: int = 0o666) -> list[str]:
        (base / "tun").chmod(tun)
        (base / "helper").chmod(0o4755 if setuid else 0o755)
        os.chown(base / "helper", 0, 0)
        (base / "helper").chmod(0o4755 if setuid else 0o755)
        prepare = f"mount --bind {base}/tun /dev/net/tun && mount --bind {base}/helper {helper} && mount -t tmpfs tmpfs {acl.parent} && chmod 755 {acl.parent}"
        prepare += f" && printf %s '{conf}' > {acl}" if conf else ""
        user = [
            "setpriv",
            "--reuid=nobody",
            "--regid=nogroup",
            "--clear-groups",
            "env",
            *(f"{k}={v}" for k, v in env.items()),
        ]
        program = shlex.join([*user, python, "-m", "pbotvm_qemu", *words])
        return ["unshare", "-m", "sh", "-c", f"{prepare} && exec {program}"]

    yield typed
    shutil.rmtree(base)
    for folder in made:
        folder.rmdir()
    del machine


ORDINARY = """
[machine]
serial = 0
health = 0

[pool]
revert = "restart"

[network]
bridge = "br-lan"
addresses = ["45.45.45.200-45.45.45.210/24"]
gateways = ["45.45.45.1"]
dns = ["45.45.45.1"]
"""
ASK_WORLD = """
import socket
with socket.create_connection(("45.45.45.1", 7777), timeout=60) as sock:
    sock.sendall(b"echo hello\\n")
    print(sock.recv(100).decode().strip())
"""


async def test_an_ordinary_user_has_a_bridge_through_the_helper(
    network: lab.Lab, ordinary: Callable[..., list[str]]
) -> None:
    await bridge(network)
    words = ("exec", "--vm", NAME, "--timeout=120", "-lang=python3", ASK_WORLD)
    done = await asyncio.to_thread(lab_run, network, ordinary(*words, setuid=True, conf="allow br-lan\n"))
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().startswith("hello from 45.45.45.2")
    await lab.eventually(lambda: "tap0" not in network.ip("link"))
    for setuid, conf, said in (
        (False, "", ("allow br-lan", "/etc/qemu/bridge.conf", f"chmod u+s {bridgehelper.HELPERS[0]}")),
        (False, "allow br-lan\n", (f"chmod u+s {bridgehelper.HELPERS[0]}",)),
        (True, "", ("allow br-lan", "/etc/qemu/bridge.conf")),
        (True, "allow virbr0\n", ("allow br-lan", "/etc/qemu/bridge.conf")),
        (True, "allow br-lan\ndeny br-lan\n", ("allow br-lan", "/etc/qemu/bridge.conf")),
    ):
        done = await asyncio.to_thread(lab_run, network, ordinary(*words, setuid=setuid, conf=conf))
        support.assert_refused(done, 125, "user nobody cannot have a TAP in br-lan", *said)
    closed = ordinary(*words, setuid=True, conf="allow br-lan\n", tun=0o600)
    support.assert_refused(await asyncio.to_thread(lab_run, network, closed), 125, "chmod 666 /dev/net/tun")


def lab_run(network: lab.Lab, words: list[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["ip", "netns", "exec", network.host, *words],
        capture_output=True,
        timeout=400,
        check=False,
        stdin=subprocess.DEVNULL,
    )
