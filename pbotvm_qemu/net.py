"""The networks of guests, as seen by a machine: its QEMU arguments, and its place in a network.

A machine's attachment is a context manager: entered before QEMU starts, left after QEMU is gone.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from pbotvm_qemu.network.attachment import VHOST, Attachment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from pbotvm_qemu.config import NetworkConfig
    from pbotvm_qemu.network.addresses import NetworkName

MAC = "02:70:62:6f:74:00"  # of the device in every snapshot; the guest takes its own when it is resumed
QUEUES_MAX = 4

# QEMU's own network: the addresses that its documentation names.
USER_NETWORK = {
    "mac": MAC, "addresses": ["10.0.2.15/24", "fec0::15/64"], "gateway4": "10.0.2.2", "gateway6": "fec0::2",
    "dns": ["10.0.2.3"], "mtu": 1500,
}  # fmt: skip


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
    from pbotvm_qemu.network import taps  # noqa: PLC0415 - pyroute2 costs 13 MB and 0.1 s, and most machines have no TAP

    async with taps.attached(network, settings, machine, count, vhost=vhost) as attachment:
        yield attachment


def has_vhost() -> bool:
    """Tell whether the kernel's own virtio backend can be opened."""
    return os.access(VHOST, os.R_OK | os.W_OK)


__all__ = ["Attachment", "attached", "imagined", "policy_arguments"]
