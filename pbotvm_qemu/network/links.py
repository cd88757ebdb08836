"""Interfaces, addresses, routes and TAPs of the host's kernel. The only importer of pyroute2.

Whatever the kernel refuses becomes a NetworkError that names the thing, the reason, and what to type.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_interface, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pyroute2 import AsyncIPRoute, NetlinkError  # type: ignore[import-untyped]
from pyroute2.netlink.nfnetlink.nfctsocket import AsyncNFCTSocket, NFCTAttrTuple  # type: ignore[import-untyped]

from pbotvm_qemu.errors import NetworkError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from ipaddress import IPv4Network, IPv6Network

    Address = IPv4Address | IPv6Address
    Interface = IPv4Interface | IPv6Interface
    Network = IPv4Network | IPv6Network

TUN = Path("/dev/net/tun")
AS_ROOT = "run as root"

# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_TUNGETIFF = 0x800454D2
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFF_TUN_EXCL = 0x8000
_IFF_MULTI_QUEUE = 0x0100

# linux/rtnetlink.h, linux/if_addr.h, linux/neighbour.h
_RT_TABLE_LOCAL = 255
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_RTN_UNICAST = 1
_NUD_NOARP = 0x40  # in a bridge: an entry that stays, and is not the bridge itself
_IFF_UP = 1
_IFA_F_NODAD = 0x02
FOR_EVER = 0xFFFFFFFF

_HINTS = {
    errno.EPERM: AS_ROOT,
    errno.EACCES: AS_ROOT,
    errno.EOPNOTSUPP: "load the kernel module for it, such as `modprobe bridge`",
    errno.EEXIST: "see `pbotvm-qemu net status`",
    errno.EBUSY: "see `ip -d link` for who uses it",
}


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn what the kernel refuses in the body into a NetworkError that begins with `what`."""
    try:
        yield
    except NetlinkError as exc:
        code = abs(exc.code)
        reason = os.strerror(code)
        if code in (errno.EPERM, errno.EACCES):
            reason += " (this needs CAP_NET_ADMIN)"
        raise NetworkError(f"cannot {what}: {reason}", hint=_HINTS.get(code)) from exc
    except OSError as exc:
        raise NetworkError(f"cannot {what}: {exc.strerror or exc}", hint=_HINTS.get(exc.errno or 0)) from exc


def unsupported(exc: NetworkError) -> bool:
    """Tell whether `exc` says that this kernel does not know the thing at all."""
    cause = exc.__cause__
    return isinstance(cause, NetlinkError) and abs(cause.code) == errno.EOPNOTSUPP


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface."""

    index: int
    name: str
    kind: str  # "bridge", "tun", "veth", ...; empty for hardware
    alias: str
    group: int
    mtu: int
    up: bool
    carrier: bool
    mac: str
    master: int  # index of the bridge it is in, or 0


@dataclass(frozen=True, slots=True)
class Route:
    """A route that is not the kernel's own for a local address."""

    family: int
    destination: Network
    gateway: Address | None
    index: int  # of its interface
    priority: int
    protocol: int
    scope: int
    source: Address | None  # preferred source address
    table: int


@dataclass(frozen=True, slots=True)
class Held:
    """An address of an interface, and how it is held."""

    address: Interface
    broadcast: str | None
    scope: int
    preferred: int  # seconds, or FOR_EVER
    valid: int


class Links:
    """A conversation with the kernel about interfaces: a context manager."""

    def __init__(self) -> None:
        self._ipr: Any = AsyncIPRoute()

    async def __aenter__(self) -> Self:
        with translated("speak with the kernel about interfaces"):
            await self._ipr.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._ipr.__aexit__(*exc)

    # interfaces ------------------------------------------------------------------------------------------------------

    async def all(self) -> list[Link]:
        """Return every interface."""
        with translated("list interfaces"):
            return [_link(message) async for message in await self._ipr.link("dump")]

    async def find(self, name: str) -> Link | None:
        """Return the interface `name`, or None."""
        return next((link for link in await self.all() if link.name == name), None)

    async def add_bridge(self, name: str, *, group: int, mac: str | None = None) -> None:
        """Make a bridge without spanning tree and multicast snooping; `group` marks it from its first moment."""
        with translated(f"make bridge {name}"):
            # Snooping forgets groups that nobody renews, and with them IPv6 neighbour discovery.
            # Without an address of its own, it would take one of its ports', and change with them.
            more = {"address": mac} if mac else {}
            await self._ipr.link(
                "add", ifname=name, kind="bridge", group=group, br_stp_state=0, br_forward_delay=0, br_mcast_snooping=0, **more
            )  # fmt: skip

    async def change(self, link: int, what: str, **changes: object) -> None:
        """Change the interface with index `link`; `what` is for the message."""
        with translated(what):
            await self._ipr.link("set", index=link, **changes)

    async def delete(self, name: str) -> None:
        """Remove the interface `name`; that it is gone already is fine."""
        found = await self.find(name)
        if found is None:
            return
        try:
            with translated(f"remove interface {name}"):
                await self._ipr.link("del", index=found.index)
        except NetworkError as exc:
            if not isinstance(exc.__cause__, NetlinkError) or abs(exc.__cause__.code) != errno.ENODEV:
                raise

    async def guard_port(self, link: Link, *, isolated: bool, mac: str) -> None:
        """Set how the bridge treats port `link`: it is the one place of `mac`, learns and floods nothing else."""
        with translated(f"set bridge port {link.name}"):
            await self._ipr.brport(
                "set", index=link.index, isolated=int(isolated), learning=0, unicast_flood=0,
                guard=1, protect=1, fast_leave=1,
            )  # fmt: skip
            await self._ipr.fdb("add", ifindex=link.index, lladdr=mac, state=_NUD_NOARP)

    # addresses and routes --------------------------------------------------------------------------------------------

    async def addresses(self) -> list[tuple[int, Interface]]:
        """Return every address with the index of its interface."""
        with translated("list addresses"):
            found = []
            async for message in await self._ipr.addr("dump"):
                local = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
                found.append((int(message["index"]), ip_interface(f"{local}/{message['prefixlen']}")))
            return found

    async def held(self, index: int) -> list[Held]:
        """Return the addresses of interface `index` with what is needed to set them elsewhere."""
        with translated("list addresses"):
            found = []
            async for message in await self._ipr.addr("dump"):
                if message["index"] != index:
                    continue
                local = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
                times = message.get_attr("IFA_CACHEINFO") or {}
                found.append(
                    Held(
                        address=ip_interface(f"{local}/{message['prefixlen']}"),
                        broadcast=message.get_attr("IFA_BROADCAST"),
                        scope=int(message["scope"]),
                        preferred=int(times.get("ifa_preferred", FOR_EVER)),
                        valid=int(times.get("ifa_valid", FOR_EVER)),
                    )
                )
            return found

    async def set_held(self, index: int, held: Held) -> None:
        """Set `held` on interface `index`; that it is there already is fine."""
        arguments: dict[str, object] = {
            "address": str(held.address.ip),
            "prefixlen": held.address.network.prefixlen,
            "scope": held.scope,
        }
        if held.broadcast:
            arguments["broadcast"] = held.broadcast
        if held.address.version == 6:
            arguments["IFA_FLAGS"] = _IFA_F_NODAD
        if held.valid != FOR_EVER:
            arguments["IFA_CACHEINFO"] = {"ifa_preferred": held.preferred, "ifa_valid": held.valid}
        with translated(f"set the address {held.address}"):
            try:
                await self._ipr.addr("add", index=index, **arguments)
            except NetlinkError as exc:
                if exc.code != errno.EEXIST:
                    raise

    async def add_address(self, index: int, address: Interface, *, name: str) -> None:
        """Give interface `index` an address, at once usable."""
        with translated(f"give {name} the address {address}"):
            more = {"broadcast": str(address.network.broadcast_address)} if address.version == 4 else {}
            flags = {} if address.version == 4 else {"IFA_FLAGS": _IFA_F_NODAD}  # nobody else is there yet
            await self._ipr.addr(
                "add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen, **more, **flags
            )

    async def remove_address(self, index: int, address: Interface, *, name: str) -> None:
        """Take an address from interface `index`."""
        with translated(f"take the address {address} from {name}"):
            try:
                await self._ipr.addr("del", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
            except NetlinkError as exc:
                if exc.code != errno.EADDRNOTAVAIL:  # it is gone already
                    raise

    async def routes(self) -> list[Route]:
        """Return the routes of all tables but the local one; one that has several ways counts once for each."""
        with translated("list routes"):
            found: list[Route] = []
            async for message in await self._ipr.route("dump"):
                table = message.get_attr("RTA_TABLE") or message["table"]
                if table != _RT_TABLE_LOCAL and message["type"] == _RTN_UNICAST and message["family"] in _FAMILIES:
                    found += _routes(message, int(table))
            return found

    async def append_route(self, route: Route, index: int) -> None:
        """Set `route` through interface `index`, beside one through another interface that may be there."""
        with translated(f"set the route to {route.destination}"):
            try:
                await self._ipr.route("append", **_arguments(route, index))
            except NetlinkError as exc:
                if exc.code != errno.EEXIST:
                    raise

    async def delete_route(self, route: Route) -> None:
        """Remove `route`; that it is gone already is fine."""
        with translated(f"remove the route to {route.destination}"):
            try:
                await self._ipr.route("del", **_arguments(route, route.index))
            except NetlinkError as exc:
                if exc.code not in (errno.ESRCH, errno.ENOENT):
                    raise


def _routes(message: Any, table: int) -> list[Route]:
    family = message["family"]
    zero = str((IPv4Address if family == socket.AF_INET else IPv6Address)(0))
    destination = ip_network(f"{message.get_attr('RTA_DST') or zero}/{message['dst_len']}", strict=False)
    ways = [(way["oif"], way.get_attr("RTA_GATEWAY")) for way in message.get_attr("RTA_MULTIPATH") or ()]
    return [
        Route(
            family=family,
            destination=destination,
            gateway=_address(gateway),
            index=int(index or 0),
            priority=int(message.get_attr("RTA_PRIORITY") or 0),
            protocol=int(message["proto"]),
            scope=int(message["scope"]),
            source=_address(message.get_attr("RTA_PREFSRC")),
            table=table,
        )
        for index, gateway in ways or [(message.get_attr("RTA_OIF"), message.get_attr("RTA_GATEWAY"))]
    ]


def _arguments(route: Route, index: int) -> dict[str, object]:
    arguments: dict[str, object] = {
        "family": route.family, "dst": str(route.destination), "oif": index, "proto": route.protocol, "scope": route.scope,
        "table": route.table,
    }  # fmt: skip
    if route.gateway:
        arguments["gateway"] = str(route.gateway)
    if route.priority:
        arguments["priority"] = route.priority
    if route.source:
        arguments["prefsrc"] = str(route.source)
    return arguments


def _address(text: str | None) -> Address | None:
    if not text:
        return None
    return IPv6Address(text) if ":" in text else IPv4Address(text)


def _link(message: Any) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    return Link(
        index=int(message["index"]),
        name=str(message.get_attr("IFLA_IFNAME")),
        kind=str((info.get_attr("IFLA_INFO_KIND") if info else "") or ""),
        alias=str(message.get_attr("IFLA_IFALIAS") or ""),
        group=int(message.get_attr("IFLA_GROUP") or 0),
        mtu=int(message.get_attr("IFLA_MTU") or 0),
        up=bool(message["flags"] & _IFF_UP),
        carrier=bool(message.get_attr("IFLA_CARRIER")),
        mac=str(message.get_attr("IFLA_ADDRESS") or ""),
        master=int(message.get_attr("IFLA_MASTER") or 0),
    )


# TAPs --------------------------------------------------------------------------------------------------------------------


def open_tap(name: str, *, queues: int = 1) -> list[int]:
    """Make the TAP `name` and return one descriptor for each queue; it is gone when the last of them is closed.

    Raises FileExistsError when there is an interface of that name, NetworkError for anything else.
    """
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    opened: list[int] = []
    try:
        for number in range(queues):
            opened.append(os.open(TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
            exclusive = 0 if number else _IFF_TUN_EXCL
            request = struct.pack("16sH22x", name.encode(), flags | exclusive)
            # The kernel replaces %d by the first free number, and says by which.
            answer = fcntl.ioctl(opened[-1], _TUNSETIFF, request)
            name = answer[:16].split(b"\0", 1)[0].decode("ascii")
    except OSError as exc:
        close_all(opened)
        if exc.errno == errno.EBUSY:
            raise FileExistsError(errno.EEXIST, "there is an interface of that name", name) from exc
        missing = exc.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO)
        hint = "modprobe tun" if missing else AS_ROOT if exc.errno in (errno.EPERM, errno.EACCES) else None
        raise NetworkError(f"cannot make a TAP: {TUN}: {exc.strerror}", hint=hint) from exc
    return opened


def tap_name(descriptor: int) -> str:
    """Return the name of the TAP behind `descriptor`."""
    with translated("read the name of a TAP"):
        answer = fcntl.ioctl(descriptor, _TUNGETIFF, b"\0" * 40)
    return answer[:16].split(b"\0", 1)[0].decode("ascii", "replace")


def close_all(descriptors: Iterable[int]) -> None:
    """Close every one of `descriptors`."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


# connections -------------------------------------------------------------------------------------------------------------


async def forget_connections(addresses: Sequence[Address]) -> int:
    """Have the kernel forget the connections that `addresses` opened, and return how many there were.

    A later guest with the same address must not get the answers of an earlier one. A kernel without connection
    tracking has none.
    """
    gone = 0
    for address in addresses:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        try:
            async with AsyncNFCTSocket(nfgen_family=family) as tracker:
                found = [
                    NFCTAttrTuple.from_netlink(family, message.get_attr("CTA_TUPLE_ORIG"))
                    async for message in await tracker.dump(tuple_orig=NFCTAttrTuple(saddr=str(address), family=family))
                ]
                for entry in found:
                    if entry.saddr == str(address):
                        with contextlib.suppress(NetlinkError):  # it ended by itself, or has no ports to name it by
                            await tracker.entry("del", tuple_orig=entry)
                            gone += 1
        except NetlinkError as exc:
            if abs(exc.code) not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOENT):
                raise NetworkError(f"cannot forget the connections of {address}: {os.strerror(abs(exc.code))}") from exc
        except OSError:
            return gone  # no connection tracking in this kernel
    return gone
