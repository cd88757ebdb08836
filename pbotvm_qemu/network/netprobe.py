"""What this host can do for guest networks.

Devices are tried for real, in a network namespace that belongs to one thread and vanishes with it: nothing is named,
nothing is mounted, so nothing can be left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from pbotvm_qemu import process
from pbotvm_qemu.errors import HostError, NetworkError, tail
from pbotvm_qemu.network import bridgehelper, links

DEADLINE = 10.0  # seconds for each probe

# linux/if_tun.h, linux/sched.h, linux/capability.h
_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_CLONE_NEWNET = 0x40000000
_CAP_NET_ADMIN = 12

_TUN = Path("/dev/net/tun")
_AS_ROOT = "run as root"


@dataclass(frozen=True, slots=True)
class Capability:
    """One thing that the host can or cannot do for guest networks."""

    name: str  # "tun", "bridge", "nftables", "bridge-helper" or "user-network"
    ok: bool
    why: str  # what was seen, in one sentence
    hint: str | None = None  # what to type when not ok


async def capabilities() -> tuple[Capability, ...]:
    """Return what this host can do: TUN devices, bridges, nftables, QEMU's bridge helper, QEMU's own network.

    Each is tried under DEADLINE; one that fails is reported, never raised. Nothing stays on the host.
    """
    # One after the other: a child that is being started holds a copy of the TAP's descriptor until its exec.
    tun, bridge = await _in_namespace()
    return tun, bridge, await _nftables(), _bridge_helper(), await _user_network()


async def _in_namespace() -> tuple[Capability, Capability]:
    """Try a TAP and a bridge in a thread of its own, so that only that thread leaves the host's network."""
    outcome: Future[tuple[Capability, Capability]] = Future()

    def work() -> None:
        try:
            outcome.set_result(_try_devices())
        except BaseException as exc:  # raised again by whoever waits
            outcome.set_exception(exc)

    # Not a pool's thread: the next task in it would find itself in the wrong network. A daemon: a stuck kernel call
    # must not keep the program from ending.
    threading.Thread(target=work, name="network-probe", daemon=True).start()
    try:
        async with asyncio.timeout(DEADLINE * 2):
            return await asyncio.wrap_future(outcome)
    except TimeoutError:
        why = f"no answer from the kernel after {DEADLINE * 2:.0f} s"
        return Capability("tun", ok=False, why=why), Capability("bridge", ok=False, why=why)


def _try_devices() -> tuple[Capability, Capability]:
    """Try both devices in this thread, which has no event loop."""
    refused = _leave_network()
    return _tun(), _bridge(refused)


def _leave_network() -> str | None:
    """Move the calling thread into a new, empty network namespace; return why not when that fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) == 0:
        return None
    return os.strerror(ctypes.get_errno())


def _tun() -> Capability:
    """Make a TAP. It is not persistent: the kernel removes it when its descriptor is closed."""
    try:
        descriptor = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        missing = exc.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO)
        return Capability("tun", ok=False, why=f"{_TUN}: {exc.strerror}", hint="modprobe tun" if missing else _AS_ROOT)
    try:
        # The kernel replaces %d by the first free number.
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"pbotvm-tap%d", _IFF_TAP | _IFF_NO_PI))
    except OSError as exc:
        return Capability("tun", ok=False, why=f"{_TUN} opens, but a TAP cannot be made: {exc.strerror}", hint=_AS_ROOT)
    finally:
        os.close(descriptor)
    return Capability("tun", ok=True, why="a TAP was made and removed")


def _bridge(refused: str | None) -> Capability:
    if not has_net_admin():
        return Capability("bridge", ok=False, why="not tried: this needs CAP_NET_ADMIN", hint=_AS_ROOT)
    if refused:
        return Capability(
            "bridge", ok=False, why=f"not tried: no network namespace to try it in ({refused})", hint=_AS_ROOT
        )
    try:
        asyncio.run(asyncio.wait_for(_make_bridge("pbotvm-br"), DEADLINE))
    except TimeoutError:
        return Capability("bridge", ok=False, why=f"no answer from the kernel after {DEADLINE:.0f} s")
    except NetworkError as exc:
        hint = "modprobe bridge" if links.unsupported(exc) else exc.hint
        return Capability("bridge", ok=False, why=str(exc), hint=hint)
    except Exception as exc:
        # pyroute2 has no exception root of its own, and a probe reports whatever stops it.
        return Capability("bridge", ok=False, why=f"netlink cannot be used: {str(exc) or type(exc).__name__}")
    return Capability("bridge", ok=True, why="a bridge was made in a throw-away network namespace")


async def _make_bridge(name: str) -> None:
    async with links.Links() as kernel:
        await kernel.add_bridge(name, group=0)
        if not await kernel.find(name):
            raise OSError(errno.ENODEV, "the new bridge is not listed")


def has_net_admin() -> bool:
    """Tell whether the calling thread has CAP_NET_ADMIN (being root is neither needed nor enough)."""
    try:
        text = Path("/proc/thread-self/status").read_text("ascii", "replace")
    except OSError:
        return os.geteuid() == 0
    for line in text.splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)
    return False


async def _nftables() -> Capability:
    try:
        nft = process.find_program("nft", package="nftables")
        listing = await process.run([nft, "list", "tables"], timeout=DEADLINE)
    except HostError as exc:
        return Capability("nftables", ok=False, why=str(exc), hint=exc.hint)
    if listing.status:
        why = f"`nft list tables` failed: {tail(listing.stderr, lines=1) or f'exit status {listing.status}'}"
        return Capability("nftables", ok=False, why=why, hint=_AS_ROOT if os.geteuid() else "modprobe nf_tables")
    return Capability("nftables", ok=True, why="`nft list tables` works")


def _bridge_helper() -> Capability:
    """Look at QEMU's helper that makes TAPs for ordinary users: whether it is there, and what it may."""
    refusal = bridgehelper.refusal()
    if refusal:
        return Capability("bridge-helper", ok=False, why=refusal.why, hint=refusal.hint)
    return Capability("bridge-helper", ok=True, why=bridgehelper.summary())


async def _user_network() -> Capability:
    """Ask QEMU whether it has a network of its own, which mode `user` needs."""
    name = "user-network"
    try:
        qemu = process.find_program("qemu-system-x86_64", package="qemu-system-x86")
        told = (await process.run([qemu, "-netdev", "help"], timeout=DEADLINE)).check()
    except HostError as exc:
        return Capability(name, ok=False, why=str(exc), hint=exc.hint)
    if b"user" not in told.stdout.split():
        return Capability(name, ok=False, why=f"{qemu} was built without it", hint="install your distribution's QEMU")
    why = "QEMU's own"
    with contextlib.suppress(HostError):
        process.find_program("passt", package="passt")
        why += (
            "; passt is installed, but does not hold guests back any better, and receives slower: see docs/network.md"
        )
    return Capability(name, ok=True, why=why)
