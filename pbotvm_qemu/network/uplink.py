"""Put an interface of this host into our bridge, with its addresses and routes, and take it out again.

Every step leaves the host reachable one way or the other: an address or a route is set at the new place before it is
taken from the old one, and the bridge has the interface's own MAC, so that the world notices nothing. A process of its
own puts everything back unless the change is confirmed in time, even when whoever made it lost his connection by it.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from pbotvm_qemu import paths, process
from pbotvm_qemu.errors import NetworkError
from pbotvm_qemu.network import links, managers, netsetup
from pbotvm_qemu.network.addresses import BRIDGES
from pbotvm_qemu.network.netsetup import GROUP, Alias
from pbotvm_qemu.network.steps import Step

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pbotvm_qemu.network.links import Held, Link, Links, Route
    from pbotvm_qemu.network.netsetup import View

BRIDGE = BRIDGES["bridge"]
UPLINK = "uplink"  # key in the bridge's alias
_RTPROT_KERNEL = 2  # linux/rtnetlink.h: the kernel sets it together with an address
_POLL = 0.2  # seconds between two looks whether the change was confirmed


def up(kernel: Links, view: View, held: list[Held], name: str, *, within: float) -> list[Step]:
    """Return the steps that put interface `name`, which has the addresses `held`, into our bridge.

    They are undone after `within` seconds unless `confirm` comes first. Raises NetworkError when it cannot be done.
    """
    bridge = view.bridge("bridge")
    alias = Alias.parse(bridge.alias) if bridge else None
    inside = alias.before.get(UPLINK) if alias else None
    if inside and inside != name:
        raise NetworkError(f"{inside} is in {BRIDGE} already", hint="take it out first: pbotvm-qemu net down bridge")
    link = _check(view, bridge, held, name)
    steps = managers.steps()
    if bridge is None:
        steps.append(
            Step(
                f"make bridge {BRIDGE} with the MAC of {name}",
                partial(kernel.add_bridge, BRIDGE, group=GROUP, mac=link.mac),
            )
        )
    if not inside:
        note = Alias("bridge", ready=False, before={UPLINK: name})
        steps.append(
            Step(f"note on {BRIDGE} that {name} goes into it", partial(_set, kernel, BRIDGE, ifalias=str(note)))
        )
    if bridge is None or bridge.mtu != link.mtu:
        steps.append(Step(f"set the MTU of {BRIDGE} to {link.mtu}", partial(_set, kernel, BRIDGE, mtu=link.mtu)))
    if bridge is None or not bridge.up:
        steps.append(Step(f"set {BRIDGE} up", partial(_set, kernel, BRIDGE, state="up")))
    moves = _moves(kernel, view, held, link, BRIDGE)
    entering = bridge is None or link.master != bridge.index
    if (entering or moves) and not (alias and alias.ready):
        steps.append(
            Step(
                f"have everything put back after {within:.0f} s, unless it is confirmed",
                partial(start_rollback, within),
            )
        )
    if entering:
        steps.append(Step(f"put {name} into {BRIDGE}", partial(_enslave, kernel, name)))
    return steps + moves


def _check(view: View, bridge: Link | None, held: list[Held], name: str) -> Link:
    """Return the interface `name`. Raises NetworkError when it cannot go into a bridge."""
    link = view.link(name)
    if link is None:
        there = ", ".join(item.name for item in view.links if item.kind == "" and item.name != "lo")
        raise NetworkError(f"there is no interface {name}", hint=f"choose one of {there or 'those in `ip link`'}")
    if link.name == "lo" or link.kind in ("bridge", "tun"):
        raise NetworkError(f"{name} cannot go into a bridge", hint="choose the interface that leads to the network")
    if link.master and (bridge is None or link.master != bridge.index):
        owner = next((item.name for item in view.links if item.index == link.master), "another one")
        raise NetworkError(
            f"{name} is in {owner} already", hint=f'if that is a bridge, use it: set `bridge = "{owner}"` in [network] of config.toml'
        )  # fmt: skip
    leased = next((item for item in held if item.address.version == 4 and item.valid != links.FOR_EVER), None)
    if leased:
        raise NetworkError(
            f"the address {leased.address} of {name} is leased for {leased.valid} s more, and whoever renews it would no longer find it",
            hint="let your network manager make the bridge, and name it as `bridge` in [network] of config.toml",
        )
    return link


def down(kernel: Links, view: View, held: list[Held]) -> list[Step]:
    """Return the steps that take the interface out of our bridge, which has the addresses `held`, and remove that.

    Raises NetworkError when guests are in it.
    """
    bridge = view.link(BRIDGE)
    if bridge is None or not netsetup.is_ours(bridge):
        return []
    alias = Alias.parse(bridge.alias)
    name = alias.before.get(UPLINK) if alias else None
    guests = [port.name for port in view.ports(bridge) if port.name != name]
    if guests:
        raise NetworkError(
            f"{BRIDGE} is in use by {', '.join(guests[:5])}", hint="stop the machines first: pbotvm-qemu list"
        )
    steps = []
    link = view.link(name) if name else None
    if link:
        if link.master == bridge.index:
            steps.append(Step(f"take {link.name} out of {BRIDGE}", partial(_set, kernel, link.name, master=0)))
        steps += _moves(kernel, view, held, bridge, link.name)
    return [*steps, Step(f"remove bridge {BRIDGE}", partial(kernel.delete, BRIDGE))]


def _moves(kernel: Links, view: View, held: list[Held], source: Link, target: str) -> list[Step]:
    """Return the steps that move addresses and routes from interface `source` to interface `target`."""
    mine = [item for item in held if not item.address.is_link_local]
    routes = [route for route in view.routes if route.index == source.index and route.protocol != _RTPROT_KERNEL]
    steps = [Step(f"give {target} the address {item.address}", partial(_give, kernel, target, item)) for item in mine]
    steps += [
        Step(f"set the route to {_text(route)} through {target}", partial(_lead, kernel, target, route))
        for route in routes
    ]
    steps += [
        Step(f"take the address {item.address} from {source.name}", partial(kernel.remove_address, source.index, item.address, name=source.name))
        for item in mine
    ]  # fmt: skip
    # The kernel takes IPv4 routes away together with the last address, but not those of IPv6.
    return steps + [
        Step(f"remove the route to {_text(route)} through {source.name}", partial(kernel.delete_route, route))
        for route in routes
    ]


def _text(route: Route) -> str:
    where = "the world" if not route.destination.prefixlen else str(route.destination)
    return f"{where} (IPv{4 if route.family == socket.AF_INET else 6})"


async def _set(kernel: Links, name: str, **changes: object) -> None:
    await kernel.change((await _find(kernel, name)).index, f"change {name}", **changes)


async def _enslave(kernel: Links, name: str) -> None:
    bridge = await _find(kernel, BRIDGE)
    await _set(kernel, name, master=bridge.index)


async def _give(kernel: Links, name: str, held: Held) -> None:
    await kernel.set_held((await _find(kernel, name)).index, held)


async def _lead(kernel: Links, name: str, route: Route) -> None:
    await kernel.append_route(route, (await _find(kernel, name)).index)


async def _find(kernel: Links, name: str) -> Link:
    link = await kernel.find(name)
    if link is None:
        raise NetworkError(f"interface {name} has vanished", hint="is somebody else changing the network? try again")
    return link


# confirmation ------------------------------------------------------------------------------------------------------------


async def start_rollback(within: float) -> None:
    """Start the process that puts everything back after `within` seconds unless the change is confirmed."""
    folder = paths.private(paths.runtime_dir(), mode=0o711)
    with (folder / "net-rollback.log").open("wb") as log:
        process.Detached(
            [sys.executable, "-m", "pbotvm_qemu", "net", "rollback", "--after", f"{within:.3f}"], log=log.fileno()
        )


async def unconfirmed(kernel: Links) -> Alias | None:
    """Return what is written on our bridge while its uplink waits for confirmation, else None."""
    link = await kernel.find(BRIDGE)
    alias = Alias.parse(link.alias) if link else None
    return alias if alias and not alias.ready and UPLINK in alias.before else None


async def confirm(kernel: Links) -> str:
    """Keep the bridge as it is, and return its uplink. Raises NetworkError when nothing waits for confirmation."""
    alias = await unconfirmed(kernel)
    if alias is None:
        raise NetworkError(
            "nothing waits for confirmation: it was confirmed, or put back, before", hint="see `pbotvm-qemu net status`"
        )
    await _set(kernel, BRIDGE, ifalias=str(Alias("bridge", ready=True, before=alias.before)))
    return alias.before[UPLINK]


async def wait_and_roll_back(after: float, back: Callable[[], Awaitable[None]]) -> bool:
    """Wait `after` seconds and call `back` unless the change was confirmed by then; tell whether it was called."""
    until = time.monotonic() + after
    async with links.Links() as kernel:
        while time.monotonic() < until:
            await asyncio.sleep(min(_POLL, after))
            if await unconfirmed(kernel) is None:
                return False
    await back()
    return True
