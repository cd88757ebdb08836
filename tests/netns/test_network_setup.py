"""Build and take away networks, in namespaces of our own: what is changed, what is not, and what a crash leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import net, network_commands
from pbotvm_qemu.config import NetworkConfig
from pbotvm_qemu.errors import NetworkError
from pbotvm_qemu.network import addresses, links, managers, netfilter, netsetup
from tests import lab, support

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(lab.missing()), reason=lab.missing() or "")]

SETTINGS = NetworkConfig(dns=("45.45.45.1",))
BOTH = netsetup.OWN


@pytest.fixture(autouse=True)
def nobody_manages_networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The host's own network managers are none of our business here."""
    monkeypatch.setattr(managers, "FILES", ())
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def network() -> Iterator[lab.Lab]:
    with lab.lab() as made, lab.inside(made.host):
        yield made


async def up(settings: NetworkConfig = SETTINGS, *networks: addresses.NetworkName, dry_run: bool = False) -> list[str]:
    done: list[str] = []
    await network_commands.up(settings, networks or BOTH, dry_run=dry_run, on_step=done.append)
    return done


async def down(*networks: addresses.NetworkName) -> list[str]:
    done: list[str] = []
    await network_commands.down(networks or addresses.NAMES, dry_run=False, on_step=done.append)
    return done


# up and down -------------------------------------------------------------------------------------------------------------


async def test_up_is_done_once_and_down_leaves_the_host_as_it_was(network: lab.Lab) -> None:
    before = lab.dump(network.host)
    assert await up()
    between = lab.dump(network.host)
    assert between != before
    assert await up() == []
    assert lab.dump(network.host) == between
    assert await down()
    lab.assert_same(network.host, before)
    assert await down() == []


async def test_one_network_without_the_other(network: lab.Lab) -> None:
    before = lab.dump(network.host)
    await up(SETTINGS, "isolated")
    assert network.run("cat", "/proc/sys/net/ipv4/ip_forward").strip() == "0"  # this one needs nothing forwarded
    await up(SETTINGS, "nat")
    await down("nat")
    assert "pbot-iso0" in network.ip("link")
    assert (await netfilter.contents()).chains
    await down("isolated")
    lab.assert_same(network.host, before)


async def test_a_dry_run_says_it_all_and_does_nothing(network: lab.Lab) -> None:
    before = lab.dump(network.host)
    said = await up(dry_run=True)
    lab.assert_same(network.host, before)
    assert await up() == said


async def test_forwarding_that_was_on_stays_on(network: lab.Lab) -> None:
    network.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    before = lab.dump(network.host)
    await up()
    await down()
    lab.assert_same(network.host, before)


async def test_a_host_that_listens_to_routers_goes_on_doing_so(network: lab.Lab) -> None:
    network.run("sysctl", "-qw", "net.ipv6.conf.lan0.accept_ra=1")
    network.ip("-6", "route", "add", "2a00:77::/64", "via", lab.WORLD["outside6"], "dev", "lan0", "proto", "ra")
    await up()
    assert network.run("cat", "/proc/sys/net/ipv6/conf/lan0/accept_ra").strip() == "2"
    await down()
    assert network.run("cat", "/proc/sys/net/ipv6/conf/lan0/accept_ra").strip() == "1"


async def test_managers_of_networks_are_told_to_leave_us_alone(
    network: lab.Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    del network
    there, absent, told = tmp_path / "NetworkManager", tmp_path / "netif", tmp_path / "told"
    there.mkdir()
    files = (
        (there, there / "conf.d/90.conf", "[keyfile]\n", ("touch", str(told))),
        (absent, tmp_path / "network/05.network", "[Match]\n", ("false",)),
    )
    monkeypatch.setattr(managers, "FILES", files)
    await up()
    assert files[0][1].read_text() == "[keyfile]\n"
    assert not files[1][1].exists()
    assert told.exists()
    told.unlink()
    assert await up() == []
    assert not told.exists()
    await down()
    assert not files[0][1].exists()
    assert told.exists()


async def test_a_manager_that_does_not_answer_is_no_obstacle(
    network: lab.Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = lab.dump(network.host)
    monkeypatch.setattr(managers, "FILES", ((tmp_path, tmp_path / "90.conf", "[keyfile]\n", ("false",)),))
    await up()
    assert "false" in caplog.text
    await down()
    lab.assert_same(network.host, before)


def descriptors() -> set[str]:
    """Return what this process has open."""
    return {str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}


# crashes -----------------------------------------------------------------------------------------------------------------

KILLER = """
import asyncio, contextlib, json, os, signal, sys
sys.path.insert(0, {root!r})
from pbotvm_qemu import errors, network_commands
from pbotvm_qemu.network import links, managers, netsetup, uplink
from pbotvm_qemu.config import NetworkConfig
from tests import lab
managers.FILES = ()
settings = NetworkConfig(dns=("45.45.45.1",))
host, what = {host!r}, {what!r}
networks = ["bridge"] if what == "bridge" else ["nat", "isolated"]
interface = "lan0" if what == "bridge" else None
async def no_rollback(within): pass
uplink.start_rollback = no_rollback

async def up(kill_at=-1, after=False):
    done = []
    def step(text):
        if kill_at == len(done) and not after: os.kill(os.getpid(), signal.SIGKILL)
        if after and len(done) == kill_at + 1: os.kill(os.getpid(), signal.SIGKILL)
        done.append(text)
    await network_commands.up(settings, networks, uplink=interface, dry_run=False, on_step=step)
    if interface:
        with contextlib.suppress(errors.NetworkError): await network_commands.confirm()  # it was, before the kill
    if kill_at == -2: os.kill(os.getpid(), signal.SIGKILL)
    return done

async def down(): await network_commands.down(["nat", "isolated", "bridge"], dry_run=False, on_step=lambda _: None)
async def prune(): await network_commands.prune(dry_run=False)

def differs(wanted):
    try: lab.assert_same(host, wanted)
    except AssertionError: return True
    return False

before = lab.dump(host)
steps = asyncio.run(up())
whole = lab.dump(host)
asyncio.run(down())
lab.assert_same(host, before)
wrong = []
for number in [*range(len(steps)), -2]:
    for mend in ("up", "prune"):
        if os.fork() == 0:
            asyncio.run(up(number))
            os._exit(1)  # it was to be killed
        _, status = os.wait()
        assert os.WIFSIGNALED(status), (number, status)
        if mend == "up":
            asyncio.run(up())
            if differs(whole): wrong.append(["up", number, lab.difference(whole, lab.dump(host))])
            asyncio.run(down())
        else:
            asyncio.run(prune())
            states = asyncio.run(network_commands.status(settings))["networks"]
            # What waits for confirmation is put back by the process that does that, or by `net down`.
            if what == "own" and any(item["state"] == "unfinished" for item in states): wrong.append(["left", number, states])
            asyncio.run(down())
        if differs(before): wrong.append([mend, number, lab.difference(before, lab.dump(host))])
print(json.dumps({{"steps": len(steps), "wrong": wrong}}))
"""


@pytest.mark.parametrize("what", ["own", "bridge"])
def test_killed_at_any_step_it_is_finished_or_removed(network: lab.Lab, what: str) -> None:
    code = KILLER.format(root=str(Path(__file__).parents[2]), host=network.host, what=what)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] > 10
    assert found["wrong"] == []


async def test_two_hundred_guests_leave_nothing(network: lab.Lab) -> None:
    await up()
    before, open_before = lab.dump(network.host), descriptors()

    async def come_and_go(mode: str) -> None:
        async with net.attached(mode, SETTINGS, "m") as here:
            assert here.guest

    for number in range(45):
        await come_and_go("nat" if number % 2 else "isolated")
        if number < 31:
            await asyncio.gather(*(come_and_go("nat") for _ in range(5)))
    lab.assert_same(network.host, before)
    assert descriptors() == open_before


async def test_a_guest_that_cannot_be_admitted_leaves_nothing(
    network: lab.Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    await up()
    before, open_before = lab.dump(network.host), descriptors()

    async def refuse(*_arguments: object, **_more: object) -> None:
        raise NetworkError("the kernel is in a bad mood")

    for name in ("change", "guard_port", "find"):
        with monkeypatch.context() as patch:
            patch.setattr(links.Links, name, refuse)
            with pytest.raises(NetworkError):
                async with net.attached("isolated", SETTINGS, "m"):
                    pass
        lab.assert_same(network.host, before)
    assert descriptors() == open_before


async def test_a_guest_gets_no_answers_of_an_earlier_one(network: lab.Lab) -> None:
    await up()
    plan = (await place("nat")).plan
    guest = plan.guest(7)
    four = str(guest.plain[0])
    network.ip("addr", "add", f"{four}/32", "dev", "pbot-nat0")  # stands for a guest that talks to the world
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((four, 0))
        sock.sendto(b"hello", (lab.WORLD["outside4"], lab.PORT))
        assert await links.forget_connections([guest.plain[0]]) == 1
        assert await links.forget_connections([guest.plain[0]]) == 0


async def place(network: addresses.NetworkName, settings: NetworkConfig = SETTINGS) -> netsetup.Place:
    async with links.Links() as kernel:
        return await netsetup.place(kernel, network, settings)


async def test_every_guest_has_a_name_and_addresses_of_its_own(network: lab.Lab) -> None:
    del network
    await up()
    async with contextlib.AsyncExitStack() as stack:
        found = [await stack.enter_async_context(net.attached("nat", SETTINGS, f"m{n}")) for n in range(20)]
        guests = [here.guest for here in found if here.guest]
        for kind in ("tap", "mac", "addresses"):
            assert len({getattr(guest, kind) for guest in guests}) == 20
        report = await network_commands.status(SETTINGS)
        assert {item["machine"] for item in report["guests"]} == {f"m{n}" for n in range(20)}  # type: ignore[attr-defined]
        with pytest.raises(NetworkError, match="in use by pbtn") as caught:
            await down()
        assert caught.value.hint
        assert len(found) == len(guests)


async def test_a_card_with_several_queues(network: lab.Lab) -> None:
    await up()
    async with net.attached("nat", SETTINGS, "m", count=2) as here:
        assert len(here.taps) == 2
        assert here.guest
        assert "numtxqueues" in network.ip("-d", "link", "show", here.guest.tap)
        argv = net.policy_arguments("nat", taps=here.taps)
        assert f"fds={here.taps[0]}:{here.taps[1]}" in argv[1]


async def test_machines_have_policies_of_their_own(network: lab.Lab) -> None:
    del network
    settings = replace(SETTINGS, machines={"m1": {"egress": "listed", "allow": ("45.45.45.1:80/tcp",), "rate": 4096}})
    await up(settings)
    async with net.attached("nat", settings, "m1") as one, net.attached("nat", settings, "m2") as two:
        assert one.guest
        assert two.guest

        def rules(guest: addresses.Guest) -> str:
            return lab.sh("nft", "list", "chain", "bridge", "pbotvm", f"to-{guest.tap}")

        assert "45.45.45.1 tcp dport 80 accept" in rules(one.guest)
        assert "45.45.45.1 tcp dport 80 accept" not in rules(two.guest)
        assert await up(settings) == []
        changed = replace(settings, machines={"m2": {"egress": "listed", "allow": ("45.45.45.1:80/tcp",)}})
        assert set(await up(changed)) == {
            f"change the rules of {one.guest.tap}, machine m1", f"change the rules of {two.guest.tap}, machine m2",
        }  # fmt: skip
        assert "45.45.45.1 tcp dport 80 accept" not in rules(one.guest)
        assert "45.45.45.1 tcp dport 80 accept" in rules(two.guest)


async def test_a_full_network_says_so(network: lab.Lab) -> None:
    del network
    settings = replace(SETTINGS, subnet4="10.50.0.0/27")
    await up(settings, "nat")
    room = (await place("nat", settings)).plan.room
    assert room == 15
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(room):
            await stack.enter_async_context(net.attached("nat", settings, "m"))
        with pytest.raises(NetworkError, match="is full") as caught:
            await stack.enter_async_context(net.attached("nat", settings, "m"))
        assert caught.value.hint


# what is in the way ------------------------------------------------------------------------------------------------------


async def test_what_others_made_is_not_touched(network: lab.Lab) -> None:
    network.ip("link", "add", "pbot-nat0", "type", "bridge")
    before = lab.dump(network.host)
    with pytest.raises(NetworkError, match="pbotvm-qemu did not make it") as caught:
        await up()
    assert "ip link set pbot-nat0" in str(caught.value.hint)
    assert await down() == []
    assert await network_commands.prune(dry_run=False) == []
    lab.assert_same(network.host, before)
    with pytest.raises(NetworkError, match="did not make it"):
        await place("nat")
    network.ip("link", "del", "pbot-nat0")
    network.run("nft", "add", "table", "inet", "pbotvm")
    before = lab.dump(network.host)
    with pytest.raises(NetworkError, match="nftables table inet pbotvm") as caught:
        await up()
    assert "nft delete table inet pbotvm" in str(caught.value.hint)
    lab.assert_same(network.host, before)


async def test_addresses_avoid_those_of_the_host(network: lab.Lab) -> None:
    network.ip("addr", "add", "10.213.180.1/24", "dev", "lan0")
    network.ip("route", "add", "172.29.0.0/16", "via", lab.WORLD["outside4"])
    await up(SETTINGS, "nat")
    assert str((await place("nat")).plan.networks[0]) == "192.168.208.0/20"
    await down()
    with pytest.raises(NetworkError, match=r"10\.213\.0\.0/16 of guests overlaps 10\.213\.180\.0/24") as caught:
        await up(replace(SETTINGS, subnet4="10.213.0.0/16"))
    assert "subnet4" in str(caught.value.hint)
    await up(SETTINGS, "nat")
    network.ip("route", "add", "192.168.210.0/24", "via", lab.WORLD["outside4"])
    assert await warned("overlaps 192.168.210.0/24")


async def warned(text: str, settings: NetworkConfig = SETTINGS) -> bool:
    found = (await network_commands.status(settings))["warnings"]
    assert isinstance(found, list)
    assert all(item["hint"] for item in found)
    return any(text in item["warning"] for item in found)


async def test_the_packets_of_guests_fit_the_way_out(network: lab.Lab) -> None:
    network.ip("link", "set", "lan0", "mtu", "1400")
    await up()
    assert "mtu 1400" in network.ip("link", "show", "pbot-nat0")
    network.ip("link", "set", "lan0", "mtu", "1300")
    assert await warned("the MTU of pbot-nat0 is 1400, the way out takes 1300")
    assert await up() == ["set the MTU of pbot-nat0 to 1300", "set the MTU of pbot-iso0 to 1300"]
    assert not await warned("MTU")


async def test_a_firewall_in_the_way_is_named(network: lab.Lab) -> None:
    await up()
    assert not await warned("")
    network.run(
        "nft", "add table ip fence; add chain ip fence FORWARD { type filter hook forward priority 0; policy drop; }"
    )
    assert await warned("the chain FORWARD of table ip fence drops forwarded packets")
    network.ip("link", "add", "br7", "type", "bridge")
    if netsetup.parameter("net/bridge/bridge-nf-call-iptables") == "1":
        assert await warned("br_netfilter", replace(SETTINGS, bridge="br7"))


def test_without_rights_it_says_so() -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    program = [
        "setpriv",
        "--bounding-set=-all",
        "--inh-caps=-all",
        "--ambient-caps=-all",
        sys.executable,
        "-m",
        "pbotvm_qemu",
    ]
    for words in (["net", "up"], ["net", "down"], ["net", "confirm"]):
        done = subprocess.run([*program, *words], env=env, capture_output=True, check=False, timeout=60)
        support.assert_refused(done, 125, "CAP_NET_ADMIN", "run as root")


async def test_without_tun_it_says_so(network: lab.Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    await up()
    before = lab.dump(network.host)
    monkeypatch.setattr(links, "TUN", tmp_path / "tun")
    with pytest.raises(NetworkError, match="cannot make a TAP") as caught:
        async with net.attached("nat", SETTINGS, "m"):
            pass
    assert caught.value.hint == "modprobe tun"
    lab.assert_same(network.host, before)


async def test_a_network_that_is_not_there_is_named(network: lab.Lab) -> None:
    del network
    for mode in ("nat", "isolated", "bridge"):
        with pytest.raises(NetworkError, match="is not there: ") as caught:
            async with net.attached(mode, SETTINGS, "m"):
                pass
        assert "pbotvm-qemu net up" in str(caught.value.hint)


async def test_a_bridge_of_the_operators_own_needs_nothing_but_rules(network: lab.Lab) -> None:
    settings = replace(SETTINGS, bridge="br7", addresses=("45.45.45.100-45.45.45.110/24",))
    with pytest.raises(NetworkError, match="there is no bridge br7") as caught:
        await up(settings, "bridge")
    assert "--uplink" in str(caught.value.hint)
    network.ip("link", "add", "br7", "address", "02:00:00:00:07:07", "type", "bridge")
    network.ip("link", "set", "br7", "up")
    before = lab.dump(network.host)
    with pytest.raises(NetworkError) as caught:
        async with net.attached("bridge", settings, "m"):
            pass
    assert "pbotvm-qemu net up bridge" in str(caught.value.hint)
    assert await up(settings, "bridge") == ["make the nftables tables bridge pbotvm and inet pbotvm"]
    assert await network_commands.prune(dry_run=False) == []
    async with net.attached("bridge", settings, "m") as here:
        assert here.guest
        assert "master br7" in network.ip("link", "show", here.guest.tap)
    await down("bridge")
    lab.assert_same(network.host, before)


async def test_two_changes_at_once_do_not_meet(network: lab.Lab) -> None:
    del network
    with network_commands._lock(), pytest.raises(NetworkError, match="another pbotvm-qemu") as caught:
        await up()
    assert caught.value.hint


# the uplink --------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def talking(network: lab.Lab) -> AsyncIterator[list[socket.socket]]:
    """Connections between the host and the world, one opened by each, over both versions of IP."""
    world, host = (lab.WORLD["outside4"], lab.WORLD["outside6"]), (lab.HOST4, lab.HOST6)
    kept = [socket.create_connection((where, lab.PORT), timeout=lab.PATIENCE) for where in world]
    with lab.inside(network.world):
        kept += [socket.create_connection((where, lab.PORT), timeout=lab.PATIENCE) for where in host]
    yield kept
    for sock in kept:
        sock.close()


def still(kept: list[socket.socket]) -> bool:
    for sock in kept:
        sock.sendall(b"echo hello\n")
    return all(sock.recv(100).startswith(b"hello from ") for sock in kept)


async def into_bridge(within: float = 30.0, name: str = "lan0") -> bool:
    return await network_commands.up(
        SETTINGS, ["bridge"], uplink=name, within=within, dry_run=False, on_step=lambda _: None
    )


async def test_an_uplink_moves_there_and_back_under_open_connections(
    network: lab.Lab, talking: list[socket.socket]
) -> None:
    before = lab.dump(network.host)
    assert still(talking)
    assert await into_bridge(within=600.0)
    assert still(talking)
    with pytest.raises(NetworkError, match="not ready"):
        await place("bridge", replace(SETTINGS, addresses=("45.45.45.100-45.45.45.110/24",)))
    assert "master pbot-br0" in network.ip("link", "show", "lan0")
    assert await network_commands.confirm() == "lan0"
    assert "dev pbot-br0" in network.ip("route", "show", "default")
    assert not await into_bridge()  # there is nothing left to do
    with socket.create_connection((lab.WORLD["private4"], lab.PORT), timeout=lab.PATIENCE) as sock:
        assert still([sock])
    await down()
    assert still(talking)
    lab.assert_same(network.host, before)


async def test_an_uplink_comes_back_by_itself(network: lab.Lab, talking: list[socket.socket]) -> None:
    before = lab.dump(network.host)
    await into_bridge(within=2.0)
    await lab.eventually(lambda: "pbot-br0" not in network.ip("link"))
    lab.assert_same(network.host, before)
    assert still(talking)
    with pytest.raises(NetworkError, match="nothing waits for confirmation"):
        await network_commands.confirm()


async def test_an_uplink_that_cannot_move_is_refused(network: lab.Lab) -> None:
    network.ip("link", "add", "br7", "type", "bridge")
    network.ip("link", "add", "one", "type", "veth", "peer", "name", "two")
    network.ip("link", "set", "one", "master", "br7")
    network.ip("addr", "add", "10.5.5.5/24", "dev", "two", "valid_lft", "600", "preferred_lft", "600")
    before = lab.dump(network.host)
    for name, said in (
        ("nowhere", "there is no interface nowhere"), ("lo", "cannot go into a bridge"), ("one", "is in br7 already"),
        ("two", r"10\.5\.5\.5/24 of two is leased"),
    ):  # fmt: skip
        with pytest.raises(NetworkError, match=said) as caught:
            await into_bridge(name=name)
        assert caught.value.hint
    lab.assert_same(network.host, before)
