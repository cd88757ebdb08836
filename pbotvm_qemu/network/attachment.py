"""What a machine has of a network while it runs: open TAPs, addresses, and what its agent is told."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING

from pbotvm_qemu.network import netfilter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pbotvm_qemu.network.addresses import Guest

VHOST = "/dev/vhost-net"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """What QEMU and the guest's agent need to know of a machine's network."""

    mode: str = "none"
    taps: tuple[int, ...] = ()  # open descriptors, one for each queue
    vhosts: tuple[int, ...] = ()  # likewise, of /dev/vhost-net
    guest: Guest | None = None
    held: list[int] = field(default_factory=list)  # those of them that are still open here
    resume: dict[str, object] | None = None  # "network" in the agent's `resume` frame
    elements: tuple[str, ...] = ()

    def hand_over(self) -> None:
        """Close our copies of what QEMU has inherited by now: the TAP lives as long as QEMU does."""
        release(self.held)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Every descriptor that QEMU is to inherit."""
        return (*self.taps, *self.vhosts)

    async def lead_forwards(self) -> None:
        """Have the forwarded ports lead to this guest from now on. Raises NetworkError when nft refuses."""
        if self.elements:
            found = await netfilter.contents()
            mine = {element.split()[2] for element in self.elements}
            text = "".join(
                f"delete element {family} {netfilter.TABLE} {name} {{ {key} : {target} }}\n"
                for family, name, key, target in found.elements
                if name.startswith("forwards_") and key in mine
            )
            text += "".join(f"add element inet {netfilter.TABLE} {element}\n" for element in self.elements)
            await netfilter.apply(text, "forward ports")


def release(held: list[int]) -> None:
    """Close what is still open, once: the numbers may be somebody else's afterwards."""
    while held:
        os.close(held.pop())


def resume(guest: Guest, dns: Sequence[str], mtu: int) -> dict[str, object]:
    """Return what the agent is told about the network of `guest`."""
    versions = {ip_address(text.partition("/")[0]).version for text in guest.addresses}
    return {
        "mac": guest.mac,
        "addresses": list(guest.addresses),
        "gateway4": next((text for text in guest.gateways if ":" not in text), None),
        "gateway6": next((text for text in guest.gateways if ":" in text), None),
        "dns": [text for text in dns if ip_address(text).version in versions],
        "mtu": mtu,
    }
