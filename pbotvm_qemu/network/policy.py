"""What guests may reach: allowed destinations as checked data, and what is never reached without being named."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Literal

from pbotvm_qemu.errors import ConfigError

MODES = ("none", "user", "nat", "bridge", "isolated")
EGRESS = ("public", "listed")
ALLOW_MAX = 256  # entries

Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address
Protocol = Literal["tcp", "udp"]

# Blocked unless an entry of `allow` names them. IANA's special-purpose registries, and every way to write a private
# IPv4 address as an IPv6 one that some gateway would turn back.
BLOCKED4 = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",
)  # fmt: skip
BLOCKED6 = (
    "::/8", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "fc00::/7",
    "fe80::/10", "fec0::/10", "ff00::/8",
)  # fmt: skip
METADATA = ("169.254.169.254", "fd00:ec2::254")  # within the blocked ranges; named for status and tests

_ENTRY = re.compile(
    r"(?:\[(?P<v6>[0-9a-fA-F:.]+(?:/[0-9]{1,3})?)\]|(?P<plain>[^\[\]]+?))"
    r"(?::(?P<low>[0-9]{1,5})(?:-(?P<high>[0-9]{1,5}))?(?:/(?P<protocol>tcp|udp))?)?"
)
NAME_MAX = 15  # bytes of an interface's name (IFNAMSIZ - 1)
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]*")
_FORWARD = re.compile(r"(?P<host>[0-9]{1,5}):(?P<guest>[0-9]{1,5})(?:/(?P<protocol>tcp|udp))?")


@dataclass(frozen=True, slots=True)
class Range:
    """Addresses from `first` to `last` in `network`, both included."""

    first: Address
    last: Address
    network: Network

    def __len__(self) -> int:
        return int(self.last) - int(self.first) + 1


@dataclass(frozen=True, slots=True)
class Allow:
    """A destination that guests may reach."""

    network: Network
    ports: tuple[int, int] | None = None  # first and last; None for every protocol
    protocol: Protocol | None = None  # None with ports: both

    def __str__(self) -> str:
        text = str(self.network)
        if self.ports is None:
            return text
        low, high = self.ports
        text = f"[{text}]" if self.network.version == 6 else text
        return f"{text}:{low}{f'-{high}' if high != low else ''}{f'/{self.protocol}' if self.protocol else ''}"


@dataclass(frozen=True, slots=True)
class Forward:
    """A port of the host's loopback that leads to a port of a guest."""

    host: int
    guest: int
    protocol: Protocol

    def __str__(self) -> str:
        return f"{self.host}:{self.guest}/{self.protocol}"


def parse_allow(text: str, source: str = "allow") -> Allow:
    """Return the destination that `text` means: ADDRESS, NETWORK, either with :PORT, :FIRST-LAST, and /tcp or /udp.

    An IPv6 address that is followed by a port stands in brackets. Raises ConfigError otherwise.
    """
    hint = "write 192.0.2.7, 192.0.2.0/24:443/tcp, or [2001:db8::/32]:53/udp; names are not looked up"
    wanted = text.strip()
    try:
        if ":" in wanted and "[" not in wanted and wanted.count(":") > 1:
            return Allow(ip_network(wanted, strict=True))
        match = _ENTRY.fullmatch(wanted)
        if not match:
            raise ValueError("it has no known form")
        network = ip_network(match["v6"] or match["plain"], strict=True)
        if match["low"] is None:
            return Allow(network)
        low, high = int(match["low"]), int(match["high"] or match["low"])
        if not 1 <= low <= high <= 65535:
            raise ValueError("ports are from 1 to 65535")
    except ValueError as exc:
        raise ConfigError(f"{source}: {text[:80]!r} is no destination: {exc}", hint=hint) from None
    protocol: Protocol | None = "tcp" if match["protocol"] == "tcp" else "udp" if match["protocol"] == "udp" else None
    return Allow(network, (low, high), protocol)


def parse_forward(text: str, source: str = "forward") -> Forward:
    """Return the forward HOST-PORT:GUEST-PORT, optionally with /tcp (the default) or /udp.

    Raises ConfigError otherwise.
    """
    match = _FORWARD.fullmatch(text.strip())
    host, guest = (int(match["host"]), int(match["guest"])) if match else (0, 0)
    if not match or not 1 <= host <= 65535 or not 1 <= guest <= 65535:
        raise ConfigError(f"{source}: {text[:80]!r} is no port forward", hint="write 8080:80 or 5353:53/udp")
    return Forward(host, guest, "udp" if match["protocol"] == "udp" else "tcp")


def parse_address(text: str, source: str) -> str:
    """Return `text` when it is an IP address. Raises ConfigError otherwise."""
    try:
        return str(ip_address(text.strip()))
    except ValueError:
        raise ConfigError(
            f"{source}: {text[:80]!r} is no IP address", hint="write 192.0.2.53 or 2001:db8::53"
        ) from None


def parse_range(text: str, source: str = "addresses") -> Range:
    """Return the range FIRST-LAST/PREFIX that `text` means. Raises ConfigError otherwise."""
    words, slash, length = text.strip().rpartition("/")
    first, dash, last = words.partition("-")
    try:
        if not slash or not dash:
            raise ValueError("it has no known form")
        low, high = ip_address(first.strip()), ip_address(last.strip())
        network = ip_network(f"{low}/{length}", strict=False)
        if low.version != high.version or int(low) > int(high) or high not in network:
            raise ValueError("the last address is not after the first one in the same network")
    except ValueError as exc:
        raise ConfigError(
            f"{source}: {text[:80]!r} is no range of addresses: {exc}", hint="write 192.168.1.200-192.168.1.219/24"
        ) from None
    return Range(low, high, network)


def parse_subnet(text: str, source: str, *, version: int) -> str:
    """Return `text` when it is "auto" or a subnet that guests can have ("none" too for IPv6).

    Raises ConfigError otherwise.
    """
    if text == "auto" or (text == "none" and version == 6):
        return text
    example = "10.42.0.0/20" if version == 4 else "fd12:3456:789a:1::/64"
    try:
        network = ip_network(text)
    except ValueError as exc:
        raise ConfigError(f"{source}: {text[:80]!r} is no subnet: {exc}", hint=f'write "auto" or {example}') from None
    if network.version != version or network.num_addresses < 32 or (version == 6 and network.prefixlen != 64):
        raise ConfigError(f"{source}: guests cannot have {network}", hint=f'write "auto" or a network like {example}')
    return text


def parse_interface(text: str, source: str) -> str:
    """Return `text` when the kernel would take it for an interface's name. Raises ConfigError otherwise."""
    size = len(text.encode("utf-8", "surrogateescape"))
    if size > NAME_MAX:
        raise ConfigError(
            f"{source}: the interface name {text[:40]!r} has {size} bytes, the kernel takes {NAME_MAX}",
            hint="choose a shorter name",
        )
    if not _INTERFACE.fullmatch(text) or text in (".", ".."):
        raise ConfigError(f"{source}: {text!r} cannot name an interface", hint="use letters, digits, dots and dashes")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the guests of a network may do."""

    egress: str = "public"  # "public": all but BLOCKED4 and BLOCKED6, and `allow`; "listed": only `allow`
    allow: tuple[Allow, ...] = ()
    dns: tuple[str, ...] = ()  # name servers; reached on port 53 whatever `egress` says
    rate: int = 0  # bytes per second in each direction, 0 for no limit
    connections: int = 0  # tracked connections of each guest, 0 for no limit
    forward: tuple[Forward, ...] = ()
