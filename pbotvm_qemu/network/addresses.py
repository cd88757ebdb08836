"""The address plan: which subnets our networks have, and which name, MAC and addresses guest number N gets.

A guest's number is its TAP's, which the kernel hands out once at a time, so the plan needs no allocator, no lock and
no list that a crash could leave behind. Everything here is pure.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, Literal

from pbotvm_qemu.errors import NetworkError
from pbotvm_qemu.network.policy import Range, parse_range

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Network = IPv4Network | IPv6Network
    Address = IPv4Address | IPv6Address

NetworkName = Literal["nat", "isolated", "bridge"]
NAMES: tuple[NetworkName, ...] = ("nat", "isolated", "bridge")

BRIDGES: dict[str, str] = {"nat": "pbot-nat0", "isolated": "pbot-iso0", "bridge": "pbot-br0"}
TAP_PREFIX = "pbt"
TAPS: dict[str, str] = {"nat": "pbtn", "isolated": "pbti", "bridge": "pbtb"}
_FIRST = {"nat": 0x0000, "isolated": 0x1000, "bridge": 0x2000}  # so that no two guests of a host share a MAC
_ROOM = 4000  # guests of one network; a /20 holds them
HELPER_TAPS = "tap"  # what QEMU's helper for ordinary users calls its TAPs, and a number
_HELPED = 16  # guests of ordinary users in one bridge
_RESERVED = 16  # addresses at the beginning of a subnet that no guest gets

# Tried in turn until one is free. Rarely used parts of the private ranges come first.
CANDIDATES4 = tuple(
    str(IPv4Network(f"{start}/20")) for start in ("10.213.176.0", "172.29.112.0", "192.168.208.0", "10.87.64.0", "172.23.16.0", "10.151.32.0")
)  # fmt: skip

_TAP = re.compile(r"pbt([nib])([0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Guest:
    """What guest number N of a network is called and has."""

    number: int
    tap: str
    mac: str
    addresses: tuple[str, ...]  # with prefix length
    gateways: tuple[str, ...]

    @property
    def plain(self) -> tuple[Address, ...]:
        """The addresses without their prefix length."""
        return tuple(ip_address(text.partition("/")[0]) for text in self.addresses)

    @property
    def link_local(self) -> IPv6Address:
        """The address that the guest's kernel makes from its MAC."""
        return link_local(self.mac)


@dataclass(frozen=True, slots=True)
class Plan:
    """The subnets of one network of guests."""

    name: NetworkName
    host: bytes  # of this host, so that bridged guests of two hosts differ
    ranges: tuple[Range, ...]
    gateways: tuple[Address, ...]

    @property
    def room(self) -> int:
        """How many guests can be in this network at once."""
        return min((_ROOM, *map(len, self.ranges)))

    @property
    def helped_room(self) -> int:
        """How many of them can have a TAP of QEMU's helper; theirs are the last numbers."""
        return min(_HELPED, self.room // 2) if self.name == "bridge" else 0

    def helped(self, number: int) -> Guest:
        """Return the guest at the helper's TAP `number`. Raises NetworkError when the network has no room for it."""
        if not 0 <= number < self.helped_room:
            raise NetworkError(
                f"the bridge has room for {self.helped_room} guests of ordinary users, this would be {HELPER_TAPS}{number}",
                hint="stop some machines, or what else made such TAPs: ip link show type tun",
            )
        return replace(self.guest(self.room - 1 - number), tap=f"{HELPER_TAPS}{number}")

    @property
    def networks(self) -> tuple[Network, ...]:
        """The subnets."""
        return tuple(item.network for item in self.ranges)

    def guest(self, number: int) -> Guest:
        """Return guest `number`. Raises NetworkError when the network has no such number."""
        if not 0 <= number < self.room:
            raise NetworkError(
                f"network {self.name} has room for {self.room} guests, this would be number {number}",
                hint="stop some machines, or give it more addresses in [network] of config.toml",
            )
        return Guest(
            number,
            f"{TAPS[self.name]}{number}",
            _mac(self.host, _FIRST[self.name] + number),
            tuple(f"{item.first + number}/{item.network.prefixlen}" for item in self.ranges),
            tuple(map(str, self.gateways)),
        )


def bridge_mac(host: bytes, name: NetworkName) -> str:
    """Return the MAC of our bridge of network `name`: no guest has it."""
    return _mac(host, 0xFF00 + NAMES.index(name))


def _mac(host: bytes, number: int) -> str:
    digest = hashlib.sha256(b"pbotvm mac " + host).digest()
    return ":".join(f"{byte:02x}" for byte in bytes((0x02, *digest[:3], *number.to_bytes(2, "big"))))


def tap_number(name: str) -> tuple[NetworkName, int] | None:
    """Return network and number of the TAP `name`, or None when it is not one of ours."""
    match = _TAP.fullmatch(name)
    if not match:
        return None
    network: NetworkName = "nat" if match[1] == "n" else "isolated" if match[1] == "i" else "bridge"
    return network, int(match[2])


def link_local(mac: str) -> IPv6Address:
    """Return the link-local address that is made from `mac` (RFC 4291, modified EUI-64)."""
    part = bytes.fromhex(mac.replace(":", ""))
    return IPv6Address(b"\xfe\x80" + b"\0" * 6 + bytes((part[0] ^ 2,)) + part[1:3] + b"\xff\xfe" + part[3:])


def own_plan(name: NetworkName, host: bytes, subnet4: IPv4Network, subnet6: IPv6Network | None) -> Plan:
    """Return the plan of one of our own networks; the first address of each subnet is the host's, when it has one."""
    subnets: list[Network] = [subnet4, *([subnet6] if subnet6 else [])]
    ranges = tuple(
        Range(net[_RESERVED], net[min(net.num_addresses - 2, _RESERVED + _ROOM - 1)], net) for net in subnets
    )
    return Plan(name, host, ranges, tuple(net[1] for net in subnets) if name == "nat" else ())


def bridged_plan(host: bytes, ranges: Sequence[str], gateways: Sequence[str], source: str = "network") -> Plan:
    """Return the plan for guests on a foreign network. Raises ConfigError when a range makes no sense."""
    return Plan("bridge", host, tuple(parse_range(text, source) for text in ranges), tuple(map(ip_address, gateways)))


def subnet6(host: bytes, name: NetworkName) -> IPv6Network:
    """Return the unique local /64 of network `name` on this host (RFC 4193): the same one every time."""
    digest = hashlib.sha256(b"pbotvm subnet " + host).digest()
    index = NAMES.index(name) + 1
    return IPv6Network((b"\xfd" + digest[:5] + index.to_bytes(2, "big") + b"\0" * 8, 64))


def choose4(taken: Iterable[Network], wanted: str = "auto") -> IPv4Network:
    """Return a subnet for guests that overlaps none of `taken`.

    Raises NetworkError that names the clash when `wanted` is a subnet and overlaps, or nothing is free.
    """
    used = [net for net in taken if net.version == 4 and net.prefixlen]
    if wanted != "auto":
        subnet = IPv4Network(wanted)
        clash = next((net for net in used if net.overlaps(subnet)), None)
        if clash:
            raise NetworkError(
                f"the subnet {subnet} of guests overlaps {clash}, which this host uses",
                hint='choose another `subnet4` in [network] of config.toml, or "auto"',
            )
        return subnet
    for text in CANDIDATES4:
        subnet = IPv4Network(text)
        if not any(net.overlaps(subnet) for net in used):
            return subnet
    raise NetworkError(
        f"every subnet that guests could have overlaps one that this host uses ({', '.join(CANDIDATES4)})",
        hint="set `subnet4` in [network] of config.toml to a private network that is free, such as 10.42.0.0/20",
    )
