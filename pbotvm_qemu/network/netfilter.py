"""The rules for guests' networks: nftables text made from checked data, in two tables that are ours alone.

`bridge pbotvm` looks at every frame that comes from or goes to a guest's TAP: is the sender who it was made to be, and
may it go there? Each guest has chains of its own, so its rules come and go in one transaction. A TAP without chains
can send nothing. `inet pbotvm` stands between the guests behind our bridge and this host, and does address translation.

A change is one transaction of `nft -f`: it happens as a whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pbotvm_qemu import process
from pbotvm_qemu.errors import CommandError, HostError, NetworkError, tail
from pbotvm_qemu.network.addresses import BRIDGES, TAP_PREFIX, TAPS
from pbotvm_qemu.network.policy import BLOCKED4, BLOCKED6, Allow, Policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pbotvm_qemu.network.addresses import Guest, Plan

TABLE = "pbotvm"
COMMENT = "pbotvm-qemu"  # of a table that we made
FAMILIES = ("bridge", "inet")
_MARK = "made-"
DEADLINE = 20.0  # seconds for each call of nft
BURST_MIN = 256 << 10  # bytes; one segmented packet of a guest has up to 64 KiB
_DNS_PORT = 53
_GUEST_CHAINS = ("from", "in", "to", "host")
_CONNECTIONS_MAX = 65536  # guests that are counted at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What the tables hold before there is any guest."""

    nat: Plan | None = None
    dhcp: bool = False  # whether our own server may be asked for an address
    connections: int = 0  # of each guest, 0 for no limit


def base(wanted: Base) -> str:
    """Return the transaction that makes both tables, or makes them anew around the guests that are there."""
    text = _header("bridge") + _bridge_base() + _header("inet") + _inet_base(wanted)
    return text + f"add chain inet {TABLE} {marker(wanted)}\n"


def marker(wanted: Base) -> str:
    """Return the name of an empty chain that says which rules the tables hold."""
    text = _bridge_base() + _inet_base(wanted)
    return f"{_MARK}{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def digest(guest: Guest, plan: Plan, policy: Policy, *, dhcp: bool = False) -> str:
    """Return a short text that changes when the rules of `guest` do."""
    return hashlib.sha256(admit(guest, plan, policy, dhcp=dhcp).encode()).hexdigest()[:12]


def removal() -> str:
    """Return the transaction that removes both tables, whether or not they are there."""
    return "".join(f"table {family} {TABLE}\ndelete table {family} {TABLE}\n" for family in FAMILIES)


def _header(family: str) -> str:
    return f'add table {family} {TABLE} {{ comment "{COMMENT}"; }}\n'


def _chain(family: str, name: str, head: str, rules: Iterable[str]) -> str:
    """Return what makes a chain if need be, and gives it `rules` instead of those it has."""
    table = f"{family} {TABLE} {name}"
    made = f"add chain {table} {{ {head} }}\n" if head else f"add chain {table}\n"
    return made + f"flush chain {table}\n" + "".join(f"add rule {table} {rule}\n" for rule in rules)


def _bridge_base() -> str:
    table = f"bridge {TABLE}"
    ours = f'"{TAP_PREFIX}*"'
    isolated = f'"{TAPS["isolated"]}*"'
    bridged = f'"{TAPS["bridge"]}*"'
    return (
        f"add map {table} senders {{ type ifname : verdict; }}\n"
        f"add map {table} receivers {{ type ifname : verdict; }}\n"
        f"add map {table} services {{ type ifname : verdict; }}\n"
        # Frames that a bridge keeps to itself (01:80:c2:00:00:0x) never come through prerouting.
        + _chain("bridge", "to_host", "type filter hook input priority -300; policy accept;", (
            f"iifname {ours} ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 drop",
            f"iifname {isolated} drop",
            # A guest on a foreign network meets this host as any other would, and gets less of it.
            f"iifname {bridged} ether type arp accept",
            f"iifname {bridged} icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept",
            f"iifname {bridged} iifname vmap @services",
            f"iifname {bridged} drop",
        ))
        + _chain("bridge", "from_host", "type filter hook output priority -300; policy accept;", (
            f"oifname {isolated} drop",
        ))
        + _chain("bridge", "from_guest", "type filter hook prerouting priority -300; policy accept;", (
            f"iifname {ours} iifname vmap @senders",
            f"iifname {ours} drop",
        ))
        + _chain("bridge", "to_guest", "type filter hook postrouting priority 300; policy accept;", (
            f"oifname {ours} oifname vmap @receivers",
        ))
    )  # fmt: skip


def _inet_base(wanted: Base) -> str:
    nat = f'"{BRIDGES["nat"]}"'
    table = f"inet {TABLE}"
    text = (
        f"add set {table} counted4 {{ type ipv4_addr; size {_CONNECTIONS_MAX}; flags dynamic; }}\n"
        f"add set {table} counted6 {{ type ipv6_addr; size {_CONNECTIONS_MAX}; flags dynamic; }}\n"
        f"add map {table} services4 {{ type ipv4_addr : verdict; }}\n"
        f"add map {table} services6 {{ type ipv6_addr : verdict; }}\n"
        f"add map {table} forwards_tcp {{ type inet_service : ipv4_addr . inet_service; }}\n"
        f"add map {table} forwards_udp {{ type inet_service : ipv4_addr . inet_service; }}\n"
    )
    counted = [
        f"ct state new add @counted{version} {{ {family} saddr ct count over {wanted.connections} }} drop"
        for version, family in (("4", "ip"), ("6", "ip6"))
        if wanted.connections
    ]
    dhcp = ["udp dport 67 accept"] if wanted.dhcp else []
    text += _chain("inet", "host_from_guest", "", (
        # Answers to what the host began: forwarded ports.
        "ct direction reply ct state established,related accept",
        # The neighbours' protocol; that nobody lies in it is the bridge table's business.
        "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept",
        *dhcp,
        "ip saddr vmap @services4",
        "ip6 saddr vmap @services6",
        "drop",
    ))  # fmt: skip
    text += _chain("inet", "outside_from_guest", "", (
        f"oifname {nat} drop",  # guests do not reach each other through the host
        "ct state invalid drop",
        *counted,
        "accept",
    ))  # fmt: skip
    text += _chain("inet", "guest_from_outside", "", (
        "ct direction reply ct state established,related accept",
        "ct state related accept",
        "drop",
    ))  # fmt: skip
    text += _chain("inet", "input", "type filter hook input priority -10; policy accept;", (
        f"iifname {nat} jump host_from_guest",
    ))  # fmt: skip
    text += _chain("inet", "forward", "type filter hook forward priority -10; policy accept;", (
        f"iifname {nat} jump outside_from_guest",
        f"oifname {nat} jump guest_from_outside",
    ))  # fmt: skip
    networks = wanted.nat.networks if wanted.nat else ()
    text += _chain("inet", "source", "type nat hook postrouting priority 100; policy accept;", (
        *(f"{'ip' if net.version == 4 else 'ip6'} saddr {net} oifname != {nat} masquerade" for net in networks),
        # A forwarded connection comes from the loopback address, which means the guest itself in the guest.
        f"oifname {nat} ip saddr 127.0.0.0/8 masquerade",
    ))  # fmt: skip
    text += _chain("inet", "loopback", "type nat hook output priority -100; policy accept;", (
        "ip daddr 127.0.0.0/8 dnat ip to tcp dport map @forwards_tcp",
        "ip daddr 127.0.0.0/8 dnat ip to udp dport map @forwards_udp",
    ))  # fmt: skip
    return text


# guests ------------------------------------------------------------------------------------------------------------------


def admit(guest: Guest, plan: Plan, policy: Policy, *, dhcp: bool = False) -> str:
    """Return the transaction that lets `guest` send what `policy` allows, whatever was allowed before."""
    table = f"bridge {TABLE}"
    text = _chain("bridge", f"to-{guest.tap}", "", _destinations(plan, policy))
    text += _chain("bridge", f"from-{guest.tap}", "", _sender(guest, policy, dhcp=dhcp))
    text += _chain("bridge", f"in-{guest.tap}", "", _limit(policy.rate))
    for name, chain in (("senders", "from"), ("receivers", "in")):
        text += f'add element {table} {name} {{ "{guest.tap}" : jump {chain}-{guest.tap} }}\n'
    if plan.name == "bridge":
        text += _chain("bridge", f"host-{guest.tap}", "", _services(policy))
        text += f'add element {table} services {{ "{guest.tap}" : jump host-{guest.tap} }}\n'
    if plan.name == "nat":
        text += _chain("inet", f"host-{guest.tap}", "", _services(policy))
        for address in guest.plain:
            text += f"add element inet {TABLE} services{address.version} {{ {address} : jump host-{guest.tap} }}\n"
    return text


def dismiss(guest: Guest, plan: Plan) -> str:
    """Return the transaction that forgets `guest`; it fails when there is nothing to forget."""
    table = f"bridge {TABLE}"
    text = ""
    for name, chain in (("senders", "from"), ("receivers", "in")):
        text += f'delete element {table} {name} {{ "{guest.tap}" : jump {chain}-{guest.tap} }}\n'
    if plan.name == "bridge":
        text += f'delete element {table} services {{ "{guest.tap}" : jump host-{guest.tap} }}\n'
    for chain in ("from", "in", "to", *(["host"] if plan.name == "bridge" else [])):
        text += f"flush chain {table} {chain}-{guest.tap}\ndelete chain {table} {chain}-{guest.tap}\n"
    if plan.name == "nat":
        for address in guest.plain:
            text += f"delete element inet {TABLE} services{address.version} {{ {address} : jump host-{guest.tap} }}\n"
        text += f"flush chain inet {TABLE} host-{guest.tap}\ndelete chain inet {TABLE} host-{guest.tap}\n"
    return text


def _limit(rate: int) -> list[str]:
    if not rate:
        return []
    # For bytes the kernel's bucket holds a second's worth beside the burst (nft_limit_init in net/netfilter/nft_limit.c).
    return [f"limit rate over {rate} bytes/second burst {max(rate // 4, BURST_MIN)} bytes drop"]


def _sender(guest: Guest, policy: Policy, *, dhcp: bool) -> list[str]:
    """Return rules that let through only what comes from whom `guest` was made to be."""
    to = f"goto to-{guest.tap}"
    rules = [
        f"ether saddr != {guest.mac} drop",
        # A tagged frame would be looked at as if it had no tag, and leave with it.
        "ether type { vlan, 8021ad } drop",
        *_limit(policy.rate),
    ]
    for address in guest.plain:
        if address.version == 4:
            rules += [
                f"arp operation {{ request, reply }} arp saddr ether {guest.mac} arp saddr ip {address} accept",
                f"ip saddr {address} udp sport 67 drop",
                f"ip saddr {address} {to}",
            ]
    if dhcp:
        rules.append("ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept")
    rules.append("icmpv6 type { nd-router-advert, nd-redirect, nd-router-solicit } drop")
    six = [address for address in guest.plain if address.version == 6]
    if six:
        own = (*six, guest.link_local)
        # The target of an advertisement, which this version of nft has no name for.
        targets = ", ".join(f"0x{int(address):032x}" for address in own)
        names = ", ".join(map(str, own))
        rules += [
            f"icmpv6 type nd-neighbor-advert ip6 saddr {{ {names} }} @th,64,128 {{ {targets} }} accept",
            "icmpv6 type nd-neighbor-advert drop",
            f"icmpv6 type nd-neighbor-solicit ip6 saddr {{ {names}, :: }} accept",
            f"ip6 saddr {{ {names} }} udp sport 547 drop",
            f"ip6 saddr {{ {names} }} {to}",
        ]
    return [*rules, "drop"]


def _destinations(plan: Plan, policy: Policy) -> list[str]:
    """Return rules for where an honest sender may send to."""
    if plan.name == "isolated":
        return [*(f"{'ip' if net.version == 4 else 'ip6'} daddr {net} accept" for net in plan.networks), "drop"]
    rules = []
    if plan.name == "nat":
        # What reaches the host itself is decided in its own table, which knows connections.
        rules += [f"{_family(gateway)} daddr {gateway} accept" for gateway in map(str, plan.gateways)]
    rules += _allowed(policy)
    if policy.egress == "listed":
        return [*rules, "drop"]
    return [
        *rules,
        f"ip daddr {{ {', '.join(BLOCKED4)} }} drop",
        f"ip6 daddr {{ {', '.join(BLOCKED6)} }} drop",
        "accept",
    ]


def _services(policy: Policy) -> list[str]:
    """Return rules for the host's own addresses: those that `allow` names one by one, and name servers on them.

    A whole network in `allow`, such as every address on port 443, does not open this host.
    """
    single = (entry for entry in policy.allow if entry.network.num_addresses == 1)
    return _allowed(replace(policy, allow=tuple(single)))


def _allowed(policy: Policy) -> list[str]:
    rules = []
    for server in policy.dns:
        rules += [
            f"{_family(server)} daddr {server} {protocol} dport {_DNS_PORT} accept" for protocol in ("udp", "tcp")
        ]
    for entry in policy.allow:
        rules += _allow(entry)
    return rules


def _family(address: str) -> str:
    return "ip6" if ":" in address else "ip"


def _allow(entry: Allow) -> list[str]:
    family = "ip" if entry.network.version == 4 else "ip6"
    to = f"{family} daddr {entry.network}" if entry.network.prefixlen else f"meta protocol {family}"
    if entry.ports is None:
        return [f"{to} accept"]
    low, high = entry.ports
    ports = str(low) if low == high else f"{low}-{high}"
    return [
        f"{to} {protocol} dport {ports} accept"
        for protocol in ((entry.protocol,) if entry.protocol else ("tcp", "udp"))
    ]


def forward_elements(guest: Guest, policy: Policy) -> list[str]:
    """Return the map elements that lead the forwards of `policy` to `guest`; none when it has no IPv4 address."""
    target = next((address for address in guest.plain if address.version == 4), None)
    if target is None:
        return []
    return [f"forwards_{item.protocol} {{ {item.host} : {target} . {item.guest} }}" for item in policy.forward]


# nft ---------------------------------------------------------------------------------------------------------------------


async def apply(text: str, what: str) -> None:
    """Carry out the transaction `text`; `what` is for the message.

    Raises NetworkError when nft refuses, and then nothing of it has happened.
    """
    nft = process.find_program("nft", package="nftables")
    try:
        done = await process.run([nft, "-f", "-"], data=text.encode(), timeout=DEADLINE)
    except CommandError as exc:
        raise NetworkError(f"cannot {what}: {exc}", hint=exc.hint) from exc
    if done.status:
        raise NetworkError(f"cannot {what}: nft: {tail(done.stderr)}", hint=_hint())


def _hint() -> str:
    return "run as root" if os.geteuid() else "see `pbotvm-qemu net status`, and `nft list ruleset`"


async def listing(*words: str) -> list[dict[str, dict[str, object]]]:
    """Return what `nft -j list WORDS` prints, each object as {kind: value}; nothing when it is not there.

    Raises NetworkError when nft cannot be used at all.
    """
    nft = process.find_program("nft", package="nftables")
    try:
        done = await process.run([nft, "-j", "list", *words], timeout=DEADLINE)
    except CommandError as exc:
        raise NetworkError(f"cannot read the rules: {exc}", hint=exc.hint) from exc
    if done.status:
        if b"No such file or directory" in done.stderr:
            return []
        raise NetworkError(f"cannot read the rules: nft: {tail(done.stderr)}", hint=_hint())
    try:
        found = json.loads(done.stdout)["nftables"]
    except (ValueError, KeyError) as exc:
        raise NetworkError("nft printed something that is not JSON", hint="check the version of nft") from exc
    return [item for item in found if isinstance(item, dict) and "metainfo" not in item]


async def tables() -> dict[str, bool]:
    """Return which of FAMILIES have a table of our name, and whether we made it."""
    found = {}
    for item in await listing("tables"):
        table = item.get("table", {})
        if table.get("name") == TABLE and table.get("family") in FAMILIES:
            family = str(table["family"])
            found[family] = await _made_by_us(family)
    return found


async def _made_by_us(family: str) -> bool:
    """Tell whether our table has our comment: JSON does not show it in all versions, the text does."""
    nft = process.find_program("nft", package="nftables")
    done = await process.run([nft, "-t", "list", "table", family, TABLE], timeout=DEADLINE)
    return f'comment "{COMMENT}"'.encode() in done.stdout


@dataclass(frozen=True, slots=True)
class Contents:
    """What our tables hold beside the rules themselves."""

    chains: frozenset[tuple[str, str]] = frozenset()  # family and name
    elements: tuple[tuple[str, str, str, str], ...] = ()  # family, map, key as nft writes it, target

    @property
    def guests(self) -> set[str]:
        """Names of the TAPs that there are chains for."""
        return {name.partition("-")[2] for _family, name in self.chains if name.partition("-")[0] in _GUEST_CHAINS}

    @property
    def markers(self) -> set[str]:
        """Names of chains that say which rules were made."""
        return {name for _family, name in self.chains if name.startswith(_MARK)}

    def sweep(self, taps: Iterable[str], addresses: Iterable[str] = ()) -> str:
        """Return the transaction that forgets `taps` and forwards to `addresses`; empty when there is nothing to forget."""
        targets = set(addresses)
        gone = {f"{kind}-{tap}" for tap in taps for kind in _GUEST_CHAINS}
        text = "".join(
            f"delete element {family} {TABLE} {name} {{ {key} : {target} }}\n"
            for family, name, key, target in self.elements
            if target.removeprefix("jump ") in gone or target.partition(" . ")[0] in targets
        )
        mine = sorted(item for item in self.chains if item[1] in gone)
        # A chain goes only when no other one leads to it: "from" before "to".
        text += "".join(f"flush chain {family} {TABLE} {name}\n" for family, name in mine)
        return text + "".join(f"delete chain {family} {TABLE} {name}\n" for family, name in mine)

    def sweep_markers(self, but: str) -> str:
        """Return what removes every marker but one."""
        return "".join(f"delete chain inet {TABLE} {name}\n" for name in sorted(self.markers - {but}))


async def contents() -> Contents:
    """Return what our tables hold."""
    chains: set[tuple[str, str]] = set()
    elements: list[tuple[str, str, str, str]] = []
    for family in FAMILIES:
        for item in await listing("table", family, TABLE):
            if "chain" in item:
                chains.add((family, str(item["chain"]["name"])))
            for pair in item.get("map", {}).get("elem", []) or []:  # type: ignore[attr-defined]
                elements.append((family, str(item["map"]["name"]), *_element(pair)))  # noqa: PERF401 - two lists are filled
    return Contents(frozenset(chains), tuple(elements))


def _element(pair: Sequence[object]) -> tuple[str, str]:
    """Return key and target of a map's element as nft takes them."""
    key, target = pair
    name = f'"{key}"' if isinstance(key, str) and key.startswith(TAP_PREFIX) else str(key)
    if isinstance(target, dict) and "jump" in target:
        return name, f"jump {target['jump']['target']}"
    if isinstance(target, dict) and "concat" in target:
        return name, " . ".join(map(str, target["concat"]))
    return name, str(target)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """A chain of somebody else that drops what it does not know."""

    family: str
    table: str
    chain: str
    hook: str


async def obstacles(hooks: Sequence[str] = ("forward",)) -> list[Obstacle]:
    """Return the chains of others at `hooks` whose policy is to drop: our guests' packets pass them too."""
    found = []
    for item in await listing("chains"):
        chain = item.get("chain", {})
        if chain.get("table") == TABLE or chain.get("policy") != "drop" or chain.get("hook") not in hooks:
            continue
        found.append(Obstacle(str(chain["family"]), str(chain["table"]), str(chain["name"]), str(chain["hook"])))
    return found


async def usable() -> str | None:
    """Return why nft cannot be used here, or None."""
    try:
        await listing("tables")
    except HostError as exc:
        return str(exc)
    except NetworkError as exc:
        return str(exc)
    return None
