"""How a machine gets a TAP: from the kernel where we may, from QEMU's helper where we may not.

A TAP exists as long as somebody holds it open, so even after a crash of ours and of QEMU the kernel takes it away; what
is left are rules for an interface that is no more, and `prune` finds them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from typing import TYPE_CHECKING

from pbotvm_qemu.errors import HostError, NetworkError
from pbotvm_qemu.network import bridgehelper, links, netfilter, netprobe, netsetup
from pbotvm_qemu.network.addresses import TAP_PREFIX, Guest, NetworkName, Plan
from pbotvm_qemu.network.attachment import VHOST, Attachment, release, resume

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from pbotvm_qemu.config import NetworkConfig
    from pbotvm_qemu.network.policy import Policy

log = logging.getLogger(__name__)

_ATTEMPTS = 64


@contextlib.asynccontextmanager
async def attached(
    network: NetworkName, settings: NetworkConfig | None, machine: str, count: int, *, vhost: bool
) -> AsyncIterator[Attachment]:
    """Give machine `machine` a TAP with `count` queues in `network` while the body runs; see net.attached."""
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
        release(held)


@contextlib.asynccontextmanager
async def _privileged(
    network: NetworkName, settings: NetworkConfig, machine: str, count: int, *, vhost: bool
) -> AsyncIterator[Attachment]:
    policy = netsetup.policy(settings.of(machine))
    async with contextlib.AsyncExitStack() as stack:
        async with links.Links() as kernel:
            place = await netsetup.place(kernel, network, settings)
            held: list[int] = []
            stack.callback(release, held)
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
        release(held)
