"""What `net` does, as plain coroutines: they return data, print nothing and never exit."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from typing import TYPE_CHECKING

from pbotvm_qemu import paths
from pbotvm_qemu.errors import NetworkError, UsageError
from pbotvm_qemu.network import addresses, links, netfilter, netprobe, netsetup, policy
from pbotvm_qemu.network import uplink as link
from pbotvm_qemu.network.addresses import BRIDGES, NAMES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from pbotvm_qemu.config import NetworkConfig
    from pbotvm_qemu.network.addresses import NetworkName
    from pbotvm_qemu.network.steps import Step

log = logging.getLogger(__name__)

ROLLBACK = 30.0  # seconds
_BR_NETFILTER = "net/bridge/bridge-nf-call-iptables"


def names(words: Sequence[str]) -> list[NetworkName]:
    """Return the networks that `words` name; nat and isolated for no words. Raises UsageError for others."""
    wrong = [word for word in words if word not in NAMES]
    if wrong:
        raise UsageError(f"{wrong[0]!r} is no network", hint=f"use {', '.join(NAMES)}")
    return [name for name in NAMES if name in words] or list(netsetup.OWN)


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """Keep others from changing networks at the same time. Raises NetworkError when somebody does."""
    folder = paths.private(paths.runtime_dir(), mode=0o711)
    fd = os.open(folder / "net.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NetworkError("another pbotvm-qemu changes networks now", hint="try again in a moment") from None
        yield
    finally:
        os.close(fd)


async def up(
    settings: NetworkConfig,
    networks: Sequence[NetworkName],
    *,
    uplink: str | None = None,
    within: float = ROLLBACK,
    dry_run: bool,
    on_step: Callable[[str], None],
) -> bool:
    """Make what is missing for `networks`; `on_step` hears of each step just before it is done.

    With "bridge" among them, interface `uplink` goes into our bridge, and comes back after `within` seconds unless
    `confirm` is called; returns whether that waits. Without `uplink`, the bridge is the operator's own. Raises NetworkError that says what is in the way. What was done
    until then stays, and the next call goes on.
    """
    if uplink and "bridge" not in networks:
        raise UsageError("--uplink belongs to network bridge", hint=f"pbotvm-qemu net up bridge --uplink {uplink}")

    async def plan(kernel: links.Links, view: netsetup.View) -> list[Step]:
        own = view.link(settings.bridge)
        if "bridge" in networks and not uplink and (own is None or own.kind != "bridge"):
            raise NetworkError(
                f"there is no bridge {settings.bridge}",
                hint="put an interface into ours: pbotvm-qemu net up bridge --uplink INTERFACE; or name your own as `bridge` in [network] of config.toml",
            )
        # Guests in a bridge, ours or not, need our tables too, so these are made in any case.
        steps = netsetup.up(kernel, view, settings, [name for name in networks if name != "bridge"])
        if uplink:
            found = view.link(policy.parse_interface(uplink, "--uplink"))
            steps += link.up(kernel, view, await kernel.held(found.index) if found else [], uplink, within=within)
        return steps

    await _carry_out(plan, dry_run=dry_run, on_step=on_step)
    async with links.Links() as kernel:
        return not dry_run and await link.unconfirmed(kernel) is not None


async def confirm() -> str:
    """Keep the uplink in the bridge, and return its name. Raises NetworkError when nothing waits for that."""
    _require_rights()
    with _lock():
        async with links.Links() as kernel:
            return await link.confirm(kernel)


async def roll_back(after: float) -> bool:
    """Wait `after` seconds, and put the uplink back unless it was confirmed; tell whether it was put back."""

    async def back() -> None:
        for _ in range(50):
            try:
                await down(["bridge"], dry_run=False, on_step=lambda what: log.warning("%s", what), unconfirmed=True)
                return
            except NetworkError as exc:
                log.warning("%s", exc)
                await asyncio.sleep(0.2)

    return await link.wait_and_roll_back(after, back)


async def down(
    networks: Sequence[NetworkName], *, dry_run: bool, on_step: Callable[[str], None], unconfirmed: bool = False
) -> None:
    """Take `networks` away, or only what was not confirmed. Raises NetworkError when guests are in them."""

    async def plan(kernel: links.Links, view: netsetup.View) -> list[Step]:
        if unconfirmed and await link.unconfirmed(kernel) is None:
            return []
        steps: list[Step] = []
        bridge = view.link(BRIDGES["bridge"])
        if "bridge" in networks and bridge:
            steps = link.down(kernel, view, await kernel.held(bridge.index))
        return steps + netsetup.down(kernel, view, networks)

    await _carry_out(plan, dry_run=dry_run, on_step=on_step)


async def prune(*, dry_run: bool) -> list[str]:
    """Remove what crashes left of networks, unless `dry_run`, and return it in words.

    Without the right to look there is nothing to say.
    """
    said: list[str] = []
    if not netprobe.has_net_admin() or await netfilter.usable():
        return said

    async def plan(kernel: links.Links, view: netsetup.View) -> list[Step]:
        return netsetup.leftovers(kernel, view)

    async with links.Links() as kernel:  # a look needs no lock, and most often there is nothing to do
        if not netsetup.leftovers(kernel, await netsetup.look(kernel)):
            return said
    await _carry_out(plan, dry_run=dry_run, on_step=said.append)
    return said


async def _carry_out(
    plan: Callable[[links.Links, netsetup.View], Awaitable[list[Step]]],
    *,
    dry_run: bool,
    on_step: Callable[[str], None],
) -> None:
    _require_rights()
    with _lock():
        async with links.Links() as kernel:
            for step in await plan(kernel, await netsetup.look(kernel)):
                on_step(step.what)
                if not dry_run:
                    await step.do()


def _require_rights() -> None:
    if not netprobe.has_net_admin():
        raise NetworkError(
            "changing networks needs CAP_NET_ADMIN, which this process lacks",
            hint="run as root; ordinary users have `--net user`, or `--net bridge` with QEMU's helper",
        )


# status ------------------------------------------------------------------------------------------------------------------


async def status(settings: NetworkConfig) -> dict[str, object]:
    """Return what there is of networks, who is in them, and what is in the way.

    An ordinary user sees the interfaces, not the rules.
    """
    rights = netprobe.has_net_admin()
    async with links.Links() as kernel:
        view = await netsetup.look(kernel) if rights else await _partial(kernel)
        warnings = await _warnings(view, settings, rights=rights)
        missing = _missing(kernel, view, settings) if rights else []
    rules = netsetup.policy(settings)
    return {
        "networks": [_network(name, view, settings) for name in NAMES],
        "guests": _guests(view),
        "policy": {
            "egress": rules.egress,
            "allow": [str(entry) for entry in rules.allow],
            "dns": list(rules.dns),
            "rate": rules.rate,
            "connections": rules.connections,
            "forward": [str(entry) for entry in rules.forward],
        },
        "machines": {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in table.items()}
            for name, table in settings.machines.items()
        },
        "missing": missing,
        "warnings": warnings,
    }


async def _partial(kernel: links.Links) -> netsetup.View:
    return netsetup.View(
        links=tuple(await kernel.all()), addresses=tuple(await kernel.addresses()), routes=tuple(await kernel.routes()),
        tables={}, contents=netfilter.Contents(), forward4="", forward6="",
    )  # fmt: skip


def _network(name: NetworkName, view: netsetup.View, settings: NetworkConfig) -> dict[str, object]:
    bridge = view.link(settings.bridge if name == "bridge" else BRIDGES[name])
    alias = netsetup.Alias.parse(bridge.alias) if bridge else None
    ours = bridge is not None and netsetup.is_ours(bridge)
    state = "down"
    if bridge and (ours or name == "bridge"):
        state = "up" if bridge.up and (alias is None or alias.ready) else "unfinished"
    elif bridge:
        state = "foreign"
    return {
        "network": name,
        "state": state,
        "bridge": bridge.name if bridge else None,
        "ours": ours,
        "addresses": [str(address) for address in view.of(bridge)],
        "mtu": bridge.mtu if bridge else None,
        "ports": [port.name for port in view.ports(bridge)],
    }


def _guests(view: netsetup.View) -> list[dict[str, object]]:
    found = []
    for item in view.links:
        if place := addresses.tap_number(item.name):
            words = item.alias.split()
            machine = words[1] if len(words) == 3 and words[0] == netsetup.ALIAS else None
            found.append({"tap": item.name, "network": place[0], "number": place[1], "machine": machine})
    return found


def _missing(kernel: links.Links, view: netsetup.View, settings: NetworkConfig) -> list[str]:
    """Return what `net up` would do for the networks that are there, in words."""
    there = [name for name in netsetup.OWN if view.link(BRIDGES[name])]
    if not there:
        return []
    return [step.what for step in netsetup.up(kernel, view, settings, there)]


async def _warnings(view: netsetup.View, settings: NetworkConfig, *, rights: bool) -> list[dict[str, str]]:
    """Return what is in the way of guests' packets, each with what to type."""
    found = []
    nat = view.link(BRIDGES["nat"])
    if nat:
        own = [address.network for address in view.of(nat) if not address.is_link_local]
        clash = next(
            (net for net in view.used(nat) for mine in own if net.version == mine.version and net.prefixlen and net.overlaps(mine)),
            None,
        )  # fmt: skip
        if clash:
            found.append(_warning(
                f"the subnet of guests overlaps {clash}, which this host uses by now",
                "stop the machines, set `subnet4` in [network] of config.toml, and type `pbotvm-qemu net up`",
            ))  # fmt: skip
        if nat.mtu > netsetup.mtu(view):
            found.append(_warning(
                f"the MTU of {nat.name} is {nat.mtu}, the way out takes {netsetup.mtu(view)}", "pbotvm-qemu net up"
            ))  # fmt: skip
    if not rights:
        return found
    for chain in await netfilter.obstacles():
        bridge = BRIDGES["nat"]
        hint = f"let guests pass: nft insert rule {chain.family} {chain.table} {chain.chain} iifname {bridge} accept; nft insert rule {chain.family} {chain.table} {chain.chain} oifname {bridge} ct state established,related accept"
        if chain.table == "firewalld":
            hint = f"firewall-cmd --permanent --zone=trusted --add-interface={bridge} && firewall-cmd --reload"
        found.append(_warning(
            f"the chain {chain.chain} of table {chain.family} {chain.table} drops forwarded packets that it does not know", hint
        ))  # fmt: skip
        if netsetup.parameter(_BR_NETFILTER) == "1" and view.link(settings.bridge):
            found.append(_warning(
                "br_netfilter sends bridged frames through that chain too", "sysctl -w net.bridge.bridge-nf-call-iptables=0"
            ))  # fmt: skip
    return found


def _warning(what: str, hint: str) -> dict[str, str]:
    return {"warning": what, "hint": hint}


def lines(report: dict[str, object]) -> list[str]:
    """Return the report of `status` as lines for people."""
    said = []
    for item in _items(report, "networks"):
        where = f"{item['bridge']}{'' if item['ours'] else ' (not made by us)'}" if item["bridge"] else "-"
        detail = " ".join([*map(str, _list(item["addresses"])), *(f"port {port}" for port in _list(item["ports"]))])
        said.append(f"{item['network']:10} {item['state']:11} {where:10} {detail}".rstrip())
    said += [
        f"guest      {item['tap']:11} {item['network']:10} machine {item['machine'] or '(being started)'}"
        for item in _items(report, "guests")
    ]
    rules = report["policy"]
    if isinstance(rules, dict):
        said += [f"policy     {key + ':':12} {_shown(value)}" for key, value in rules.items()]
    different = report["machines"]
    if isinstance(different, dict):
        for machine, table in different.items():
            said += [f"policy     {key + ':':12} {_shown(value)} (machine {machine})" for key, value in table.items()]
    said += [f"missing    {what}" for what in _list(report["missing"])]
    for item in _items(report, "warnings"):
        said += [f"warning    {item['warning']}", f"           -> {item['hint']}"]
    return said


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _items(report: dict[str, object], key: str) -> list[dict[str, object]]:
    return [item for item in _list(report[key]) if isinstance(item, dict)]


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
