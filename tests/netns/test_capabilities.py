"""The host's network capabilities, asked of the real kernel."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from pathlib import Path

import pytest

from pbotvm_qemu.network import netprobe

pytestmark = pytest.mark.netns

SYS_ADMIN = 21
NET_ADMIN = 12


def holds(capability: int) -> bool:
    status = Path("/proc/self/status").read_text()
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> capability & 1)


def inventory() -> tuple[list[str], str]:
    """What a probe must leave as it was: interfaces of its names (others may change meanwhile), our namespace."""
    interfaces = sorted(entry.name for entry in Path("/sys/class/net").glob("pbotvm-*"))
    return interfaces, str(Path("/proc/self/ns/net").readlink())


async def probe() -> dict[str, netprobe.Capability]:
    return {item.name: item for item in await netprobe.capabilities()}


@pytest.mark.skipif(not (holds(SYS_ADMIN) and holds(NET_ADMIN)), reason="needs CAP_SYS_ADMIN and CAP_NET_ADMIN")
async def test_a_privileged_probe_finds_devices_and_leaves_nothing() -> None:
    before = inventory()
    found = await probe()
    assert inventory() == before
    assert set(found) == {"tun", "bridge", "nftables", "bridge-helper", "user-network"}
    assert found["bridge"].ok, found["bridge"].why
    if os.access("/dev/net/tun", os.R_OK | os.W_OK):
        assert found["tun"].ok, found["tun"].why
    if shutil.which("qemu-system-x86_64"):
        assert found["user-network"].ok, found["user-network"].why
        assert found["user-network"].why.startswith("QEMU's own")
    if shutil.which("nft"):
        assert found["nftables"].ok, found["nftables"].why


async def test_whoever_asks_gets_a_reason_and_keeps_his_network() -> None:
    before = inventory()
    for item in (await probe()).values():
        assert item.why
        assert not item.ok or item.hint is None
    assert inventory() == before


@pytest.mark.skipif(not (holds(SYS_ADMIN) and holds(NET_ADMIN)), reason="needs CAP_SYS_ADMIN and CAP_NET_ADMIN")
async def test_probes_at_the_same_time_do_not_meet() -> None:
    results = await asyncio.gather(*(probe() for _ in range(8)))
    assert all(found["bridge"].ok for found in results)
    # A thread ends just after it has handed over its result.
    for thread in threading.enumerate():
        if thread.name == "network-probe":
            await asyncio.to_thread(thread.join, 5)
            assert not thread.is_alive()


@pytest.mark.skipif(not (holds(SYS_ADMIN) and holds(NET_ADMIN)), reason="needs CAP_SYS_ADMIN and CAP_NET_ADMIN")
async def test_without_a_namespace_the_host_itself_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netprobe, "_leave_network", lambda: "Operation not permitted")
    before = inventory()
    found = await probe()
    assert inventory() == before
    assert not found["bridge"].ok
    assert "Operation not permitted" in found["bridge"].why
