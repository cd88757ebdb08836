"""What this host's networks for guests are made of, step by step: build, take away, look.

What is wanted is compared with what the kernel has, and the difference is a list of steps. So `--dry-run` prints
what would be done, a second `net up` does nothing, and one that was killed is finished by the next. Our mark is on
every bridge from its first moment (a group number); what else must be remembered is written on the bridge itself
(its alias), which vanishes together with what it tells of.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import socket
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import IPv4Network, IPv6Network, ip_interface
from pathlib import Path
from typing import TYPE_CHECKING

from pbotvm_qemu.errors import NetworkError
from pbotvm_qemu.network import addresses, dhcp, managers, netfilter
from pbotvm_qemu.network.addresses import BRIDGES, NAMES, NetworkName, Plan
from pbotvm_qemu.network.steps import Step

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from pbotvm_qemu.config import NetworkConfig
    from pbotvm_qemu.network.links import Interface, Link, Links, Network, Route
    from pbotvm_qemu.network.policy import Policy

log = logging.getLogger(__name__)

GROUP = 0x70626F74  # "pbot": the link group of what we made
ALIAS = "pbotvm-qemu"
_READY = "ready"
OWN: tuple[NetworkName, ...] = ("nat", "isolated")
ISOLATED4 = IPv4Network("10.213.208.0/20")  # known to guests alone, so it cannot clash with the host's

FORWARD4 = "net/ipv4/ip_forward"
FORWARD6 = "net/ipv6/conf/all/forwarding"
_PROC = Path("/proc/sys")


@dataclass(frozen=True, slots=True)
class Alias:
    """What we write on a bridge: which network it is, whether it is finished, and what was before."""

    network: NetworkName
    ready: bool
    before: dict[str, str] = field(default_factory=dict)  # kernel settings that we changed, as they were

    def __str__(self) -> str:
        words = [ALIAS, self.network, _READY if self.ready else "unfinished"]
        return " ".join([*words, *(f"{name}={value}" for name, value in self.before.items())])

    @staticmethod
    def parse(text: str) -> Alias | None:
        """Return what `text` says, or None when it is not ours."""
        words = text.split()
        if len(words) < 3 or words[0] != ALIAS or words[1] not in NAMES:
            return None
        network: NetworkName = "nat" if words[1] == "nat" else "isolated" if words[1] == "isolated" else "bridge"
        return Alias(network, words[2] == _READY, dict(word.split("=", 1) for word in words[3:] if "=" in word))


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What the kernel has now."""

    links: tuple[Link, ...]
    addresses: tuple[tuple[int, Interface], ...]
    routes: tuple[Route, ...]
    tables: dict[str, bool]  # family of a table of our name, and whether it is ours
    contents: netfilter.Contents
    forward4: str
    forward6: str

    def link(self, name: str) -> Link | None:
        """Return the interface `name`, or None."""
        return next((link for link in self.links if link.name == name), None)

    def bridge(self, network: NetworkName) -> Link | None:
        """Return our bridge of `network`, or None. Raises NetworkError when its name belongs to somebody else."""
        link = self.link(BRIDGES[network])
        if link and not is_ours(link):
            raise NetworkError(
                f"there is an interface {link.name}, and pbotvm-qemu did not make it",
                hint=f"rename or remove it: ip link set {link.name} name OTHER",
            )
        return link

    def of(self, link: Link | None) -> list[Interface]:
        """Return the addresses of `link`."""
        return [address for index, address in self.addresses if link and index == link.index]

    def ports(self, link: Link | None) -> list[Link]:
        """Return the members of bridge `link`."""
        return [item for item in self.links if link and item.master == link.index]

    def used(self, but: Link | None = None) -> list[Network]:
        """Return every network that this host has an address in or a route to, those of interface `but` left out."""
        mine = but.index if but else 0
        found = [address.network for index, address in self.addresses if index != mine]
        return [*found, *(route.destination for route in self.routes if route.index != mine)]


def is_ours(link: Link) -> bool:
    """Tell whether we made the bridge `link`."""
    if link.kind != "bridge":
        return False
    return Alias.parse(link.alias) is not None or (link.group == GROUP and not link.alias)


async def look(links: Links) -> View:
    """Return what the kernel has now. Raises NetworkError when it cannot be read."""
    tables = await netfilter.tables()
    return View(
        links=tuple(await links.all()),
        addresses=tuple(await links.addresses()),
        routes=tuple(await links.routes()),
        tables=tables,
        contents=await netfilter.contents() if any(tables.values()) else netfilter.Contents(),
        forward4=parameter(FORWARD4),
        forward6=parameter(FORWARD6),
    )


def parameter(name: str) -> str:
    """Return the kernel parameter `name`, a path below /proc/sys; empty when there is none."""
    try:
        return (_PROC / name).read_text("ascii").strip()
    except OSError:
        return ""


def _write(name: str, value: str) -> None:
    """Set a kernel parameter. Raises NetworkError when the kernel refuses."""
    try:
        (_PROC / name).write_text(value, "ascii")
    except OSError as exc:
        raise NetworkError(
            f"cannot set {name.replace('/', '.')} to {value}: {exc.strerror}", hint="run as root; in a container, /proc/sys must be writable"
        ) from exc  # fmt: skip


def host_id() -> bytes:
    """Return what is always the same on this host, and another on every other host."""
    with contextlib.suppress(OSError):
        return hashlib.sha256(Path("/etc/machine-id").read_bytes()).digest()
    return socket.gethostname().encode()


def resolvers() -> tuple[str, ...]:
    """Return the name servers of this host that guests could ask too: none on a loopback address."""
    for file in ("/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"):
        with contextlib.suppress(OSError):
            words = [line.split() for line in Path(file).read_text("utf-8", "replace").splitlines()]
            found = [word[1].partition("%")[0] for word in words if len(word) > 1 and word[0] == "nameserver"]
            with contextlib.suppress(ValueError):
                kept = [
                    text
                    for text in found
                    if not ip_interface(text).ip.is_loopback and not ip_interface(text).ip.is_link_local
                ]
                return tuple(kept[:3])
    return ()


# plans -------------------------------------------------------------------------------------------------------------------


def wanted_plan(network: NetworkName, settings: NetworkConfig, view: View) -> Plan:
    """Return the address plan that `network` is to have; an existing bridge keeps its subnet unless it is told another.

    Raises NetworkError when addresses clash.
    """
    host = host_id()
    if network == "bridge":
        return addresses.bridged_plan(host, settings.addresses, settings.gateways)
    if network == "isolated":
        six = addresses.subnet6(host, network) if settings.subnet6 != "none" else None
        return addresses.own_plan(network, host, ISOLATED4, six)
    bridge = view.bridge(network)
    has = [address.network for address in view.of(bridge) if not address.is_link_local]
    four = next((net for net in has if isinstance(net, IPv4Network)), None)
    keep = settings.subnet4 == "auto" and four is not None
    subnet4 = four if keep and four else addresses.choose4(view.used(bridge), settings.subnet4)
    subnet6 = None
    if settings.subnet6 == "auto":
        subnet6 = addresses.subnet6(host, network)
    elif settings.subnet6 != "none":
        subnet6 = IPv6Network(settings.subnet6)
    clash = next(
        (net for net in view.used(bridge) if subnet6 and net.version == 6 and net.prefixlen and net.overlaps(subnet6)),
        None,
    )
    if clash:
        raise NetworkError(
            f"the subnet {subnet6} of guests overlaps {clash}, which this host uses",
            hint="set `subnet6` in [network] of config.toml to another /64, or to \"none\"",
        )  # fmt: skip
    return addresses.own_plan(network, host, subnet4, subnet6)


def mtu(view: View) -> int:
    """Return the largest packet that guests behind us may send: what the way out takes, at most 1500 bytes."""
    defaults = {route.index for route in view.routes if not route.destination.prefixlen}
    return min([1500, *(link.mtu for link in view.links if link.index in defaults and link.mtu >= 1280)])


def base(view: View, settings: NetworkConfig, networks: Iterable[NetworkName]) -> netfilter.Base:
    """Return what the tables are to hold when `networks` exist."""
    nat = wanted_plan("nat", settings, view) if "nat" in networks else None
    return netfilter.Base(nat=nat, dhcp=settings.dhcp, connections=settings.connections)


# up ----------------------------------------------------------------------------------------------------------------------


def up(links: Links, view: View, settings: NetworkConfig, networks: Sequence[NetworkName]) -> list[Step]:
    """Return the steps that are missing for `networks`. Raises NetworkError when somebody else's things are in the way."""
    _check_tables(view)
    steps = managers.steps()
    there = {name for name in OWN if view.bridge(name)} | set(networks)
    for network in networks:
        steps += _bridge_steps(links, view, settings, network)
    steps += _rule_steps(view, base(view, settings, there))
    steps += _guest_steps(links, view, settings)
    for network in networks:
        steps += _open_steps(links, view, settings, network)
    if "nat" in there:
        steps += _dhcp_steps(view, settings)
    return steps


def _dhcp_steps(view: View, settings: NetworkConfig) -> list[Step]:
    """Return the step that starts, changes or ends the DHCP server."""
    name = BRIDGES["nat"]
    if not settings.dhcp:
        return [Step(f"stop dnsmasq on {name}", dhcp.stop)] if dhcp.left() else []
    text = dhcp.configuration(wanted_plan("nat", settings, view), name, policy(settings).dns, mtu(view))
    if dhcp.running() == dhcp.digest(text):
        return []
    return [Step(f"start dnsmasq on {name}", partial(dhcp.start, text))]


def _guest_steps(links: Links, view: View, settings: NetworkConfig) -> list[Step]:
    """Return the steps that give guests, which run already, the policy that is wanted now."""
    steps = []
    for link in view.links:
        found = addresses.tap_number(link.name)
        words = link.alias.split()
        if not found or len(words) != 3 or words[0] != ALIAS:
            continue
        network, number = found
        plan = wanted_plan(network, settings, view)
        if number >= plan.room:
            continue
        now = policy(settings.of(words[1]))
        text = netfilter.admit(plan.guest(number), plan, now, dhcp=settings.dhcp and network == "nat")
        alias = tap_alias(words[1], text)
        if link.alias != alias:
            steps.append(
                Step(f"change the rules of {link.name}, machine {words[1]}", _readmit(links, link.name, text, alias))
            )
    return steps


def _readmit(links: Links, name: str, text: str, alias: str) -> Callable[[], Awaitable[None]]:
    async def do() -> None:
        await netfilter.apply(text, f"change the rules of {name}")
        await _set(links, name, ifalias=alias)

    return do


def _check_tables(view: View) -> None:
    for family, ours in view.tables.items():
        if not ours:
            raise NetworkError(
                f"there is an nftables table {family} {netfilter.TABLE}, and pbotvm-qemu did not make it",
                hint=f"rename or remove it: nft delete table {family} {netfilter.TABLE}",
            )


def _bridge_steps(links: Links, view: View, settings: NetworkConfig, network: NetworkName) -> list[Step]:
    """Return the steps up to a bridge that has its addresses and is still down."""
    name = BRIDGES[network]
    bridge = view.bridge(network)
    steps: list[Step] = []
    if bridge is None:
        steps.append(
            Step(
                f"make bridge {name}",
                lambda: links.add_bridge(name, group=GROUP, mac=addresses.bridge_mac(host_id(), network)),
            )
        )
    alias = Alias.parse(bridge.alias) if bridge else None
    if alias is None:
        first = Alias(network, ready=False)
        steps.append(Step(f"mark {name} as ours", lambda: _set(links, name, ifalias=str(first))))
    parameters = {"accept_ra": "0", "autoconf": "0"} if network == "nat" else {"disable_ipv6": "1"}
    for key, value in parameters.items():
        path = f"net/ipv6/conf/{name}/{key}"
        if (_PROC / "net/ipv6").is_dir() and (bridge is None or parameter(path) != value):
            steps.append(Step(f"set {path.replace('/', '.')} to {value}", _setter(path, value)))
    if network == "nat":
        steps += _address_steps(links, view, settings, bridge, name)
        if settings.forward and (bridge is None or parameter(_localnet(name)) != "1"):
            steps.append(
                Step(
                    f"set {_localnet(name).replace('/', '.')} to 1, for forwarded ports", _setter(_localnet(name), "1")
                )
            )
    size = mtu(view)
    if bridge is None or bridge.mtu != size:
        steps.append(Step(f"set the MTU of {name} to {size}", lambda: _set(links, name, mtu=size)))
    return steps


def _localnet(name: str) -> str:
    return f"net/ipv4/conf/{name}/route_localnet"


def _address_steps(links: Links, view: View, settings: NetworkConfig, bridge: Link | None, name: str) -> list[Step]:
    plan = wanted_plan("nat", settings, view)
    want = [
        ip_interface(f"{gateway}/{net.prefixlen}") for gateway, net in zip(plan.gateways, plan.networks, strict=True)
    ]
    has = [address for address in view.of(bridge) if not address.is_link_local]
    steps = []
    for address in want:
        if address.version == 6 and not (_PROC / "net/ipv6").is_dir():
            continue
        if address not in has:
            steps.append(Step(f"give {name} the address {address}", partial(_add_address, links, name, address)))
    for address in has:
        if address not in want:
            if view.ports(bridge):
                raise NetworkError(
                    f"{name} is in use by {len(view.ports(bridge))} guests, and its addresses are to change", hint="stop the machines first"
                )  # fmt: skip
            steps.append(
                Step(
                    f"take the address {address} from {name}",
                    partial(_del_address, links, name, address),
                )
            )
    return steps


def _rule_steps(view: View, wanted: netfilter.Base) -> list[Step]:
    mark = netfilter.marker(wanted)
    if len(view.tables) == len(netfilter.FAMILIES) and view.contents.markers == {mark}:
        return []
    text = netfilter.base(wanted) + view.contents.sweep_markers(mark)
    return [Step(f"make the nftables tables {_TABLES}", lambda: netfilter.apply(text, "make the nftables tables"))]


_TABLES = " and ".join(f"{family} {netfilter.TABLE}" for family in netfilter.FAMILIES)


def _open_steps(links: Links, view: View, settings: NetworkConfig, network: NetworkName) -> list[Step]:
    """Return the steps that put a finished bridge to work. What is changed beyond it is noted on it first."""
    name = BRIDGES[network]
    bridge = view.bridge(network)
    alias = Alias.parse(bridge.alias) if bridge else None
    before = dict(alias.before) if alias else {}
    steps: list[Step] = []
    changes: list[tuple[str, str]] = []
    if network == "nat":
        changes = _forwarding(view, settings)
        for path, _value in changes:
            before.setdefault(path, parameter(path))
        if changes:
            noted = Alias(network, ready=False, before=before)
            if alias is None or alias != noted:
                steps.append(
                    Step(
                        f"note on {name} what the settings below are now", lambda: _set(links, name, ifalias=str(noted))
                    )
                )
        steps += [Step(f"set {path.replace('/', '.')} to {value}", _setter(path, value)) for path, value in changes]
    if bridge is None or not bridge.up:
        steps.append(Step(f"set {name} up", lambda: _set(links, name, state="up")))
    ready = Alias(network, ready=True, before=before)
    if alias is None or alias != ready or steps:
        steps.append(Step(f"mark {name} as finished", lambda: _set(links, name, ifalias=str(ready))))
    return steps


def _forwarding(view: View, settings: NetworkConfig) -> list[tuple[str, str]]:
    """Return the kernel parameters that let packets pass through this host, as far as they are not set."""
    changes = []
    if view.forward4 != "1":
        changes.append((FORWARD4, "1"))
    if view.forward6 == "0" and settings.subnet6 != "none":
        # A host that forwards no longer listens to routers, unless told so: it would lose its own way out.
        for link in view.links:
            path = f"net/ipv6/conf/{link.name}/accept_ra"
            if (
                link.name not in BRIDGES.values()
                and "/" not in link.name
                and parameter(path) == "1"
                and _learned(view, link)
            ):
                changes.append((path, "2"))
        changes.append((FORWARD6, "1"))
    return changes


def _learned(view: View, link: Link) -> bool:
    """Tell whether the host learned a route on `link` from a router."""
    return any(
        route.index == link.index and route.family == socket.AF_INET6 and route.protocol == _RTPROT_RA
        for route in view.routes
    )


_RTPROT_RA = 9  # linux/rtnetlink.h


# down --------------------------------------------------------------------------------------------------------------------


def down(links: Links, view: View, networks: Sequence[NetworkName]) -> list[Step]:
    """Return the steps that take `networks` away. Raises NetworkError when guests are still in them."""
    steps: list[Step] = []
    if "nat" in networks and dhcp.left():
        steps.append(Step(f"stop dnsmasq on {BRIDGES['nat']}", dhcp.stop))
    left = {name for name in NAMES if view.link(BRIDGES[name]) and name not in networks}
    for network in networks:
        link = view.link(BRIDGES[network])
        if link is None or not is_ours(link) or network == "bridge":  # that one is taken apart by uplink.py
            continue
        guests = [port.name for port in view.ports(link)]
        if guests:
            raise NetworkError(
                f"{link.name} is in use by {', '.join(guests[:5])}{' and others' if len(guests) > 5 else ''}",
                hint="stop the machines first: pbotvm-qemu list",
            )
        alias = Alias.parse(link.alias)
        if alias:
            steps += _restore_steps(alias.before)
        steps.append(Step(f"remove bridge {link.name}", partial(links.delete, link.name)))
    taps = [link.name for link in view.links if addresses.tap_number(link.name)]
    if not left and not taps and any(view.tables.values()):
        _check_tables(view)
        steps.append(
            Step(
                f"remove the nftables tables {_TABLES}",
                lambda: netfilter.apply(netfilter.removal(), "remove the nftables tables"),
            )
        )
    if not left:
        steps += managers.removal()
    return steps


def _restore_steps(before: dict[str, str]) -> list[Step]:
    """Return the steps that set kernel parameters back, the last one first."""
    return [
        Step(f"set {path.replace('/', '.')} back to {value}", _setter(path, value))
        for path, value in reversed(before.items())
        if value and (_PROC / path).exists() and parameter(path) != value
    ]


def leftovers(links: Links, view: View) -> list[Step]:
    """Return the steps that remove what a crash left: rules of guests that are gone, networks that were never finished."""
    steps: list[Step] = []
    stale = view.contents.guests - {link.name for link in view.links}
    if stale and all(view.tables.values()):
        text = view.contents.sweep(stale)
        steps.append(
            Step(f"remove the rules of {', '.join(sorted(stale))}", lambda: netfilter.apply(text, "remove rules"))
        )
    unfinished = []
    for network in OWN:
        link = view.link(BRIDGES[network])
        alias = Alias.parse(link.alias) if link else None
        if link and is_ours(link) and (alias is None or not alias.ready):
            unfinished.append(network)
    if unfinished:
        steps += down(links, view, unfinished)
    elif not any(view.tables.values()) and not any(view.link(BRIDGES[name]) for name in NAMES):
        steps += managers.removal()
    return steps


# for machines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a guest's TAP goes."""

    plan: Plan
    bridge: Link
    peers: bool  # whether guests of this network reach each other
    dhcp: bool


async def place(links: Links, network: NetworkName, settings: NetworkConfig) -> Place:
    """Return where a guest of `network` goes. Raises NetworkError when the network is not there or not finished."""
    name = BRIDGES[network] if network != "bridge" else settings.bridge
    everything = await links.all()
    bridge = next((link for link in everything if link.name == name), None)
    if bridge is None or bridge.kind != "bridge":
        what = "is no bridge" if bridge else "does not exist"
        hint = f"pbotvm-qemu net up {network}"
        if network == "bridge":
            hint = "name an existing bridge in [network] of config.toml, or make one: pbotvm-qemu net up bridge --uplink INTERFACE"
        raise NetworkError(f"network {network} is not there: {name} {what}", hint=hint)
    alias = Alias.parse(bridge.alias)
    if name in BRIDGES.values() and not is_ours(bridge):
        raise NetworkError(f"{name} is there, and pbotvm-qemu did not make it", hint="see `pbotvm-qemu net status`")
    if not bridge.up or (alias is not None and not alias.ready):
        raise NetworkError(
            f"network {network} is not finished: {name} is not ready", hint=f"pbotvm-qemu net up {network}"
        )
    if network == "bridge":
        if not settings.addresses:
            raise NetworkError(
                "mode bridge needs addresses for guests, so that none can take another one",
                hint='set `addresses = ["192.168.1.200-192.168.1.219/24"]` and `gateways` in [network] of config.toml',
            )
        return Place(
            plan=addresses.bridged_plan(host_id(), settings.addresses, settings.gateways),
            bridge=bridge,
            peers=False,
            dhcp=False,
        )
    if network == "isolated":
        six = addresses.subnet6(host_id(), network) if settings.subnet6 != "none" else None
        return Place(
            plan=addresses.own_plan(network, host_id(), ISOLATED4, six), bridge=bridge, peers=settings.peers, dhcp=False
        )
    own = [address for index, address in await links.addresses() if index == bridge.index and not address.is_link_local]
    four = next((address.network for address in own if address.version == 4), None)
    six = next((address.network for address in own if address.version == 6), None)
    if not isinstance(four, IPv4Network):
        raise NetworkError(f"{name} has lost its address", hint=f"pbotvm-qemu net up {network}")
    assert six is None or isinstance(six, IPv6Network)
    return Place(plan=addresses.own_plan(network, host_id(), four, six), bridge=bridge, peers=False, dhcp=settings.dhcp)


def policy(settings: NetworkConfig) -> Policy:
    """Return what guests may do, with the host's name servers when none are configured."""
    wanted = settings.policy()
    return wanted if wanted.dns else replace(wanted, dns=resolvers())


def tap_alias(machine: str, rules: str) -> str:
    """Return what is written on a TAP: whose it is, and which rules it has."""
    return f"{ALIAS} {machine} {hashlib.sha256(rules.encode()).hexdigest()[:12]}"


def silence(name: str) -> None:
    """Keep the host from speaking IPv6 on interface `name`, a port that has no business of its own."""
    with contextlib.suppress(NetworkError):  # a kernel without IPv6
        _write(f"net/ipv6/conf/{name}/disable_ipv6", "1")


# deeds -------------------------------------------------------------------------------------------------------------------


async def _set(links: Links, name: str, **changes: object) -> None:
    link = await links.find(name)
    if link is None:
        raise NetworkError(f"interface {name} has vanished", hint="is somebody else changing the network? try again")
    await links.change(link.index, f"change {name}", **changes)


async def _add_address(links: Links, name: str, address: Interface) -> None:
    link = await links.find(name)
    assert link
    await links.add_address(link.index, address, name=name)


async def _del_address(links: Links, name: str, address: Interface) -> None:
    link = await links.find(name)
    assert link
    await links.remove_address(link.index, address, name=name)


def _setter(path: str, value: str) -> Callable[[], Awaitable[None]]:
    async def do() -> None:
        _write(path, value)

    return do
