"""The guest's network card: take the identity that the host gives, switch the network on and off.

Spoken straight to the kernel (rtnetlink(7)), because this root file system may have no program for it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
import sys
import time
from typing import NamedTuple

CARD = "eth0"
STATE = "/run/pbotvm/network.json"  # what the host last said, for `network on`
_RESOLV = "/etc/resolv.conf"
_ENTRIES_MAX = 8
_CARRIER_TIMEOUT = 2.0  # seconds

# linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h
_NEWLINK, _NEWADDR, _DELADDR, _GETADDR, _NEWROUTE = 16, 20, 21, 22, 24
_REQUEST, _ACK, _DUMP, _CREATE, _REPLACE = 0x1, 0x4, 0x300, 0x400, 0x100
_ERROR, _DONE = 2, 3
_IFLA_ADDRESS, _IFLA_MTU = 1, 4
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_FLAGS = 1, 2, 4, 8
_IFA_F_NODAD = 0x02
_RTA_OIF, _RTA_GATEWAY = 4, 5
_RT_TABLE_MAIN, _RTPROT_STATIC, _RT_SCOPE_UNIVERSE, _RTN_UNICAST = 254, 4, 0, 1
_IFF_UP = 1


class BadNetworkError(Exception):
    """What the host said about the network cannot be followed; nothing was changed."""


class Config(NamedTuple):
    """What the card is to be."""

    mac: bytes
    addresses: tuple[tuple[int, bytes, int], ...]  # family, address, prefix length
    gateways: tuple[tuple[int, bytes], ...]
    dns: tuple[str, ...]
    mtu: int


def parse(value: object) -> Config:
    """Return the checked object `network` of a `resume` frame. Raises BadNetworkError that names what is wrong."""
    if not isinstance(value, dict):
        raise BadNetworkError("network: not an object")
    try:
        mac = bytes.fromhex(str(value.get("mac")).replace(":", ""))
    except ValueError:
        mac = b""
    if len(mac) != 6 or mac[0] & 1:
        raise BadNetworkError("network: mac is not the address of a card")
    mtu = value.get("mtu")
    if not isinstance(mtu, int) or isinstance(mtu, bool) or not 576 <= mtu <= 65535:
        raise BadNetworkError("network: mtu is not a number from 576 to 65535")
    gateways = [value.get(key) for key in ("gateway4", "gateway6")]
    return Config(
        mac,
        tuple(_interface(text) for text in _texts(value, "addresses")),
        tuple(_address(text) for text in gateways if text is not None),
        tuple(str(socket.inet_ntop(*_address(text))) for text in _texts(value, "dns")),
        mtu,
    )


def _texts(value: dict[str, object], key: str) -> list[object]:
    items = value.get(key, [])
    if not isinstance(items, list) or len(items) > _ENTRIES_MAX:
        raise BadNetworkError(f"network: {key} is not a list of at most {_ENTRIES_MAX} texts")
    return items


def _address(text: object) -> tuple[int, bytes]:
    family = socket.AF_INET6 if isinstance(text, str) and ":" in text else socket.AF_INET
    try:
        return family, socket.inet_pton(family, text if isinstance(text, str) else "")
    except (OSError, ValueError):  # the latter for NUL, and for half a surrogate pair
        raise BadNetworkError(f"network: {str(text)[:60]!r} is no address") from None


def _interface(text: object) -> tuple[int, bytes, int]:
    address, _slash, length = text.partition("/") if isinstance(text, str) else ("", "", "")
    family, packed = _address(address)
    if not length.isdecimal() or len(length) > 3 or int(length) > len(packed) * 8:
        raise BadNetworkError(f"network: {str(text)[:60]!r} has no prefix length")
    return family, packed, int(length)


def apply(config: Config) -> None:
    """Make the card be `config`, and switch it on. Raises OSError when the kernel refuses."""
    with Netlink() as kernel:
        kernel.up(False)
        kernel.flush()
        # Nobody here may tell this guest where to go, and its addresses are its own: no need to ask around first.
        for name, text in (
            ("accept_ra", "0"),
            ("accept_dad", "0"),
            ("router_solicitations", "0"),
            ("addr_gen_mode", "0"),
        ):
            _set(name, text)
        kernel.card(config.mac, config.mtu)
        kernel.up(True)
        for address in config.addresses:
            kernel.address(*address)
        for gateway in config.gateways:
            kernel.gateway(*gateway)
    _write(_RESOLV, "".join(f"nameserver {server}\n" for server in config.dns) + "options timeout:2 attempts:2\n")


def off() -> None:
    """Switch the card off; its addresses and routes are gone. Raises OSError when the kernel refuses."""
    with Netlink() as kernel:
        kernel.up(False)
        kernel.flush()


def prepare() -> None:
    """Have the driver look at the card's cable once, at boot; without a card there is nothing to do.

    It does so a while after the card was first switched on, and never when the card is switched off before that: the
    card of a guest that was frozen earlier could stay without a carrier for ever.
    """
    if os.path.exists(STATE):  # an agent that was started again finds the card in use
        return
    with contextlib.suppress(OSError), Netlink() as kernel:
        kernel.up(True)
        until = time.monotonic() + _CARRIER_TIMEOUT
        while not _has_carrier() and time.monotonic() < until:
            time.sleep(0.01)
        kernel.up(False)
        kernel.flush()


def _has_carrier() -> bool:
    with open(f"/sys/class/net/{CARD}/carrier", encoding="ascii") as file:
        return file.read().strip() == "1"


def resume(value: object) -> None:
    """Follow the key `network` of a `resume` frame: an object, or false to switch it off.

    Raises BadNetworkError and OSError.
    """
    if value is False:
        off()
        return
    config = parse(value)
    with contextlib.suppress(OSError):
        _write(STATE, json.dumps(value))
    apply(config)


def _set(name: str, text: str) -> None:
    with contextlib.suppress(OSError):  # a kernel without IPv6
        _write(f"/proc/sys/net/ipv6/conf/{CARD}/{name}", text)


def _write(file: str, text: str) -> None:
    with open(file, "w", encoding="ascii") as stream:
        stream.write(text)


class Netlink:
    """A conversation with the kernel about the card."""

    def __init__(self) -> None:
        """Raise OSError when there is no card."""
        self._index = socket.if_nametoindex(CARD)
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._sock.settimeout(5.0)
        self._number = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._sock.close()

    def up(self, wanted: bool) -> None:
        """Switch the card on or off."""
        flags = _IFF_UP if wanted else 0
        self._change(_NEWLINK, 0, struct.pack("BxHiII", 0, 0, self._index, flags, _IFF_UP))

    def card(self, mac: bytes, mtu: int) -> None:
        """Set the card's own address and its largest packet."""
        body = struct.pack("BxHiII", 0, 0, self._index, 0, 0)
        self._change(_NEWLINK, 0, body + _attribute(_IFLA_ADDRESS, mac) + _attribute(_IFLA_MTU, struct.pack("I", mtu)))

    def address(self, family: int, address: bytes, length: int) -> None:
        """Give the card an address."""
        body = struct.pack("BBBBi", family, length, 0, 0, self._index)
        body += _attribute(_IFA_LOCAL, address) + _attribute(_IFA_ADDRESS, address)
        if family == socket.AF_INET:
            host = (1 << (32 - length)) - 1
            body += _attribute(_IFA_BROADCAST, struct.pack("!I", struct.unpack("!I", address)[0] | host))
        else:
            body += _attribute(_IFA_FLAGS, struct.pack("I", _IFA_F_NODAD))
        self._change(_NEWADDR, _CREATE | _REPLACE, body)

    def gateway(self, family: int, address: bytes) -> None:
        """Set the default route."""
        body = struct.pack(
            "BBBBBBBBI", family, 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, _RT_SCOPE_UNIVERSE, _RTN_UNICAST, 0
        )
        body += _attribute(_RTA_GATEWAY, address) + _attribute(_RTA_OIF, struct.pack("i", self._index))
        self._change(_NEWROUTE, _CREATE | _REPLACE, body)

    def flush(self) -> None:
        """Take every address from the card, and with them its routes."""
        found = self._talk(_GETADDR, _DUMP, struct.pack("BBBBi", 0, 0, 0, 0, 0))
        for body in found:
            if struct.unpack_from("BBBBi", body)[4] == self._index:
                with contextlib.suppress(OSError):  # it went together with another one
                    self._change(_DELADDR, 0, body)

    def _change(self, kind: int, flags: int, body: bytes) -> None:
        self._talk(kind, flags | _ACK, body)

    def _talk(self, kind: int, flags: int, body: bytes) -> list[bytes]:
        """Ask the kernel, and return the bodies of its answers. Raises OSError with what it says."""
        self._number += 1
        self._sock.send(struct.pack("IHHII", 16 + len(body), kind, flags | _REQUEST, self._number, 0) + body)
        found: list[bytes] = []
        while True:
            data = self._sock.recv(1 << 16)
            while len(data) >= 16:
                length, answer, _flags, number, _pid = struct.unpack_from("IHHII", data)
                part, data = data[16:length], data[(length + 3) & ~3 :]
                if number != self._number:
                    continue
                if answer == _DONE:
                    return found
                if answer == _ERROR:
                    code = -struct.unpack_from("i", part)[0]
                    if code:
                        raise OSError(code, os.strerror(code), CARD)
                    return found
                found.append(part)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def main(arguments: list[str] | None = None) -> int:
    """Be the guest's command `network on|off|status`; return its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        if words == ["off"]:
            off()
        elif words == ["on"]:
            with open(STATE, encoding="ascii") as file:
                apply(parse(json.load(file)))
        elif words == ["status"]:
            # Not `operstate`: the kernel brings that up to date a while after the card was switched.
            with open(f"/sys/class/net/{CARD}/flags", encoding="ascii") as file:
                _say("on" if int(file.read(), 16) & _IFF_UP else "off")
        else:
            _say("usage: network on|off|status")
            return 2
    except FileNotFoundError:
        _say("network: this machine was made without one")
        return 1
    except (OSError, BadNetworkError, ValueError) as exc:
        missing = isinstance(exc, OSError) and exc.errno in (errno.ENODEV, errno.ENXIO)
        _say("network: this machine was made without one" if missing else f"network: {exc}")
        return 1
    return 0


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a command of the guest
