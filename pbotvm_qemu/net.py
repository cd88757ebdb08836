"""The networks of guests, as seen by a machine: its QEMU arguments, its TAP, its addresses, its rules.

A machine's attachment is a context manager: entered before QEMU starts, left after QEMU is gone. A TAP exists as long
as somebody holds it open, so even after a crash of ours and of QEMU the kernel takes it away; what is left are rules
for an interface that is no more, and `prune` finds them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING

from pbotvm_qemu.errors import HostError, NetworkError
from pbotvm_qemu.network import bridgehelper, links, netfilter, netprobe, netsetup
from pbotvm_qemu.network.addresses import TAP_PREFIX, Guest, NetworkName, Plan

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from pbotvm_qemu.config import NetworkConfig
    from pbotvm_qemu.network.policy import Policy

log = logging.getLogger(__name__)

MAC = "02:70:62:6f:74:00"  # of the device in every snapshot; the guest takes its own when it is resumed
VHOST = "/dev/vhost-net"
QUEUES_MAX = 4
_ATTEMPTS = 64

# QEMU's own network: the addresses that its documentation names.
USER_NETWORK = {
    "mac": MAC, "addresses": ["10.0.2.15/24", "fec0::15/64"], "gateway4": "10.0.2.2", "gateway6": "fec0::2",
    "dns": ["10.0.2.3"], "mtu": 1500,
}  # fmt: skip


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
        _release(self.held)

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


def _release(held: list[int]) -> None:
    """Close what is still open, once: the numbers may be somebody else's afterwards."""
    while held:
        os.close(held.pop())


def imagined(mode: str, cpus: int) -> int:
    """Return how many TAP descriptors a guest with `cpus` processors gets in `mode`: one for each queue."""
    return min(cpus, QUEUES_MAX) if mode in ("nat", "isolated", "bridge") else 0


def policy_arguments(mode: str, *, taps: Sequence[int] = (), vhosts: Sequence[int] = ()) -> list[str]:
    """Return QEMU's arguments for network mode `mode`; "none" gives the guest no network card at all.

    `taps` and `vhosts` are numbers of descriptors that QEMU inherits.
    """
    if mode == "none":
        return ["-nic", "none"]
    # Nobody waits for a restored guest to announce itself: it becomes another one at once.
    card = f"virtio-net-pci,netdev=net0,id=virtio-net0,mac={MAC},guest_announce=off,romfile="
    if mode == "user":
        return ["-netdev", "user,id=net0", "-device", card]
    many = len(taps) > 1
    backend = f"tap,id=net0,{'fds' if many else 'fd'}={':'.join(map(str, taps))}"
    if vhosts:
        backend += f",vhost=on,{'vhostfds' if many else 'vhostfd'}={':'.join(map(str, vhosts))}"
    if many:
        card += f",mq=on,vectors={2 * len(taps) + 2}"
    return ["-netdev", backend, "-device", card]


@contextlib.asynccontextmanager
async def attached(
    mode: str, settings: NetworkConfig | None, machine: str, *, count: int = 1, vhost: bool = False
) -> AsyncIterator[Attachment]:
    """Give machine `machine` its place in the network of `mode`, with `count` queues, while the body runs.

    Without `settings`, its card has nothing at the other end, and no network needs to be up. Raises NetworkError that says what is missing; nothing is left then.
    """
    if mode == "none":
        yield Attachment()
        return
    if mode == "user":
        yield Attachment(mode=mode, resume=dict(USER_NETWORK) if settings else None)
        return
    network: NetworkName = "nat" if mode == "nat" else "isolated" if mode == "isolated" else "bridge"
    if settings is None:
        with _loose(count, vhost=vhost) as attachment:
            yield attachment
    elif netprobe.has_net_admin():
        async with _privileged(network, settings, machine, count, vhost=vhost) as attachment:
            yield attachment
    else:
        async with _helped(network, settings) as attachment:
            yield attachment


@contextlib.contextmanager
def _loose(count: int, *, vhost: bool) -> Iterator[Attachment]:
    """Make a TAP that is in no bridge and stays down."""
    held: list[int] = []
    try:
        held += (taps := links.open_tap(f"{TAP_PREFIX}x%d", queues=count))
        held += (vhosts := _open_vhost(count) if vhost else [])
        yield Attachment(mode="loose", taps=tuple(taps), vhosts=tuple(vhosts), held=held)
    finally:
        _release(held)


@contextlib.asynccontextmanager
async def _privileged(
    network: NetworkName, settings: NetworkConfig, machine: str, count: int, *, vhost: bool
) -> AsyncIterator[Attachment]:
    policy = netsetup.policy(settings.of(machine))
    async with contextlib.AsyncExitStack() as stack:
        async with links.Links() as kernel:
            place = await netsetup.place(kernel, network, settings)
            held: list[int] = []
            stack.callback(_release, held)
            guest, taps = _open_tap(place.plan, count)
            held += taps
            held += (vhosts := _open_vhost(count) if vhost else [])
            text = netfilter.admit(guest, place.plan, policy, dhcp=place.dhcp)
            await _admit(network, guest, text)
            stack.push_async_callback(_forget, guest, place.plan, policy)
            await links.forget_connections(guest.plain)
            await _join(kernel, place, guest, netsetup.tap_alias(machine, text), isolated=not place.peers)
        yield Attachment(
            mode=network,
            taps=tuple(taps),
            vhosts=tuple(vhosts),
            held=held,
            guest=guest,
            resume=resume(guest, policy.dns, place.bridge.mtu),
            elements=tuple(netfilter.forward_elements(guest, policy)) if network == "nat" else (),
        )


def _open_tap(plan: Plan, count: int) -> tuple[Guest, list[int]]:
    """Make a TAP with a number that nobody has. Raises NetworkError when the network is full."""
    room = plan.room - plan.helped_room
    for attempt in range(_ATTEMPTS + room):
        # At random, so that a number is not used again while the world still sends answers to who had it before.
        number = secrets.randbelow(room) if attempt < _ATTEMPTS else attempt - _ATTEMPTS
        guest = plan.guest(number)
        with contextlib.suppress(FileExistsError):
            return guest, links.open_tap(guest.tap, queues=count)
    raise NetworkError(
        f"network {plan.name} is full: {room} guests are in it",
        hint="stop some machines, or give it more addresses in [network] of config.toml",
    )


async def _admit(network: NetworkName, guest: Guest, text: str) -> None:
    """Make the rules of `guest`. Raises NetworkError that says when the tables are not there."""
    try:
        await netfilter.apply(text, f"make rules for {guest.tap}")
    except NetworkError as exc:
        there = await netfilter.tables()
        if not all(there.get(family) for family in netfilter.FAMILIES):
            exc.hint = f"our tables are not there: pbotvm-qemu net up {network}"
        raise


async def _join(kernel: links.Links, place: netsetup.Place, guest: Guest, alias: str, *, isolated: bool) -> None:
    """Put the TAP of `guest` into its bridge; it goes up last, when everything that holds it back is in place."""
    tap = await kernel.find(guest.tap)
    if tap is None:
        raise NetworkError(f"the TAP {guest.tap} has vanished", hint="does another program change the network?")
    # A bridge without an address of its own takes the smallest one of its ports, and changes with them.
    mac = "fe" + guest.mac[2:]
    await kernel.change(tap.index, f"set up {tap.name}", ifalias=alias, mtu=place.bridge.mtu, address=mac)
    await kernel.change(tap.index, f"put {tap.name} into {place.bridge.name}", master=place.bridge.index)
    await kernel.guard_port(tap, isolated=isolated, mac=guest.mac)
    netsetup.silence(tap.name)
    await kernel.change(tap.index, f"set {tap.name} up", state="up")


async def _forget(guest: Guest, plan: Plan, policy: Policy) -> None:
    """Remove the rules of `guest`; what cannot be removed now is found by `prune`."""
    try:
        if policy.forward:
            text = (await netfilter.contents()).sweep({guest.tap}, map(str, guest.plain))
        else:
            text = netfilter.dismiss(guest, plan)
        await netfilter.apply(text, f"remove the rules of {guest.tap}")
    except (NetworkError, HostError) as exc:
        log.warning("%s; `pbotvm-qemu prune` removes what is left", exc)


def _open_vhost(count: int) -> list[int]:
    """Open the kernel's own virtio backend."""
    with links.translated(f"open {VHOST}"):
        return [os.open(VHOST, os.O_RDWR | os.O_CLOEXEC) for _ in range(count)]


def has_vhost() -> bool:
    """Tell whether the kernel's own virtio backend can be opened."""
    return os.access(VHOST, os.R_OK | os.W_OK)


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


@contextlib.asynccontextmanager
async def _helped(network: NetworkName, settings: NetworkConfig) -> AsyncIterator[Attachment]:
    """Get a TAP from QEMU's helper. Only root can make rules, so there are none for this guest."""
    if network != "bridge":
        raise NetworkError(
            f"mode {network} needs CAP_NET_ADMIN", hint="run as root, or use `--net bridge` or `--net user`"
        )
    async with links.Links() as kernel:
        place = await netsetup.place(kernel, network, settings)
    held = [await bridgehelper.open_tap(place.bridge.name)]
    try:
        name = links.tap_name(held[0])
        guest = place.plan.helped(int("".join(filter(str.isdigit, name)) or 0))
        servers = settings.dns or netsetup.resolvers()
        yield Attachment(
            mode=network, taps=tuple(held), held=held, guest=guest, resume=resume(guest, servers, place.bridge.mtu)
        )
    finally:
        _release(held)


__all__ = ["Attachment", "attached", "imagined", "policy_arguments"]
