"""The accelerator's verdict, against a QEMU that behaves in each of the ways that must be told apart."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import accel, paths
from pbotvm_qemu.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path

PANIC = "[    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)"
MSR = "qemu-system-x86_64: error: failed to set MSR 0x10a to 0x69"
FOREVER = "exec sleep 60"


class Host:
    """A host made of files: its /dev/kvm, its /boot, its QEMU."""

    def __init__(self, root: Path) -> None:
        self.device = root / "kvm"
        self.boot = root / "boot"
        self.kernel = root / "vmlinuz"
        self.qemu = root / "qemu"
        self.starts = root / "starts"
        self.device.touch()
        self.boot.mkdir()
        self.kernel.touch()
        self.behave("exit 0")

    def behave(self, script: str) -> None:
        self.qemu.write_text(f'#!/bin/sh\necho "$*" >> {self.starts}\n{script}\n')
        self.qemu.chmod(0o755)

    async def choose(self, deadline: float = 5.0) -> accel.Verdict:
        return await accel.choose(str(self.qemu), self.kernel, deadline=deadline)

    @property
    def boots(self) -> list[str]:
        return self.starts.read_text().splitlines() if self.starts.exists() else []


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = Host(tmp_path)
    monkeypatch.setattr(accel, "DEVICE", made.device)
    monkeypatch.setattr(accel, "_BOOT", made.boot)
    return made


def say(text: str) -> str:
    return f"echo '{text}' >&2"


async def test_kernel_that_misses_its_root_has_booted(host: Host) -> None:
    host.behave(say(PANIC))
    verdict = await host.choose()
    assert (verdict.name, verdict.probed) == ("kvm", True)


async def test_booted_counts_at_once_though_qemu_stays(host: Host) -> None:
    host.behave(f"{say(PANIC)}\n{FOREVER}")
    started = time.monotonic()
    assert (await host.choose(deadline=30)).name == "kvm"
    assert time.monotonic() - started < 10


async def test_the_probe_asks_for_kvm_and_gives_the_kernel(host: Host) -> None:
    await host.choose()
    (line,) = host.boots
    assert "-accel kvm -cpu host" in line
    assert f"-kernel {host.kernel}" in line
    assert "-no-reboot" in line


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        pytest.param(f"{say(MSR)}; kill -ABRT $$", r"failed to set MSR 0x10a \(`-cpu host`", id="register refused"),
        pytest.param("exit 1", "QEMU ended with status 1", id="ends without a word"),
        pytest.param(
            f"{say('Could not access KVM kernel module')}; exit 1", "status 1: Could not access", id="refuses"
        ),
        pytest.param(say("Kernel panic - not syncing: stack-protector"), "stack-protector", id="another panic"),
    ],
)
async def test_qemu_that_ends_means_tcg_and_is_named(host: Host, script: str, reason: str) -> None:
    host.behave(script)
    verdict = await host.choose()
    assert (verdict.name, verdict.probed) == ("tcg", True)
    assert re.search(reason, verdict.reason)


async def test_internal_error_ends_the_wait(host: Host) -> None:
    host.behave(f"{say('KVM internal error. Suberror: 1')}\n{say('emulation failure')}\n{FOREVER}")
    started = time.monotonic()
    verdict = await host.choose(deadline=30)
    assert verdict.name == "tcg"
    assert "KVM internal error. Suberror: 1" in verdict.reason
    assert time.monotonic() - started < 10


async def test_silence_is_cut_at_the_deadline(host: Host) -> None:
    host.behave(FOREVER)
    verdict = await host.choose(deadline=0.3)
    assert verdict.name == "tcg"
    assert "nothing but silence after 0.3 s" in verdict.reason


async def test_a_boot_that_stops_half_way_tells_its_last_words(host: Host) -> None:
    host.behave(f"{say('Linux version 6.12')}\n{FOREVER}")
    verdict = await host.choose(deadline=0.3)
    assert verdict.name == "tcg"
    assert "not booted after 0.3 s: Linux version 6.12" in verdict.reason


async def test_qemu_that_cannot_be_started_means_tcg(host: Host) -> None:
    host.qemu.chmod(0o644)
    verdict = await host.choose()
    assert verdict.name == "tcg"
    assert "cannot be started" in verdict.reason


async def test_no_device_means_tcg_without_a_boot(host: Host) -> None:
    host.device.unlink()
    verdict = await host.choose()
    assert verdict.name == "tcg"
    assert "there is no" in verdict.reason
    assert not host.boots
    assert not paths.accelerator_verdicts().exists()


async def test_a_device_that_cannot_be_opened_means_tcg(host: Host) -> None:
    host.device.unlink()
    host.device.mkdir()  # cannot be opened for writing, not even by root
    verdict = await host.choose()
    assert verdict.name == "tcg"
    assert "cannot be opened" in verdict.reason
    assert not paths.accelerator_verdicts().exists()


async def test_without_a_kernel_nothing_is_claimed_or_kept(host: Host) -> None:
    verdict = await accel.choose(str(host.qemu), None)
    assert (verdict.name, verdict.probed) == ("tcg", False)
    assert "create" in verdict.reason
    assert accel.cached(str(host.qemu)) is None


async def test_the_hosts_own_kernel_is_tried(host: Host) -> None:
    (host.boot / "vmlinuz").touch()
    mine = host.boot / f"vmlinuz-{os.uname().release}"
    mine.touch()
    await accel.choose(str(host.qemu), None)
    assert f"-kernel {mine} " in host.boots[0]


async def test_the_verdict_is_kept_and_forgotten(host: Host) -> None:
    host.behave(say(PANIC))
    assert accel.cached(str(host.qemu)) is None
    first = await host.choose()
    assert await host.choose() == first == accel.cached(str(host.qemu))
    assert len(host.boots) == 1
    accel.forget()
    accel.forget()
    assert accel.cached(str(host.qemu)) is None
    await host.choose()
    assert len(host.boots) == 2


async def test_another_qemu_or_cpu_or_kernel_is_tried_anew(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.behave(say(PANIC))
    assert (await host.choose()).name == "kvm"
    host.behave(f"{say(MSR)}; exit 1")  # an update of the package
    assert accel.cached(str(host.qemu)) is None
    assert (await host.choose()).name == "tcg"
    with monkeypatch.context() as patch:
        patch.setattr(accel, "cpu_model", lambda: "Another CPU")
        assert accel.cached(str(host.qemu)) is None
    now = os.uname()
    with monkeypatch.context() as patch:
        patch.setattr(os, "uname", lambda: os.uname_result((now[0], now[1], "99.0", now[3], now[4])))
        assert accel.cached(str(host.qemu)) is None
    assert accel.cached(str(host.qemu)) is not None


@pytest.mark.parametrize(
    "damage",
    [
        "", "{", "[]", "null", '{"key": 1}', "\udcff", '{"key": KEY}',
        '{"key": KEY, "verdict": []}',
        '{"key": KEY, "verdict": {"name": "xen", "reason": ""}}',
        '{"key": KEY, "verdict": {"name": ["kvm"], "reason": ""}}',
        '{"key": KEY, "verdict": {"name": "kvm", "reason": 1}}',
    ],
)  # fmt: skip
async def test_a_damaged_file_is_not_believed(host: Host, damage: str) -> None:
    file = paths.accelerator_verdicts()
    await host.choose()
    key = json.dumps(json.loads(file.read_text())["key"])
    file.write_bytes(damage.replace("KEY", key).encode("utf-8", "surrogateescape"))
    assert accel.cached(str(host.qemu)) is None
    host.behave(say(PANIC))
    assert (await host.choose()).name == "kvm"
    kept = accel.cached(str(host.qemu))
    assert kept is not None
    assert kept.name == "kvm"


async def test_a_verdict_that_cannot_be_kept_still_counts(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    host.behave(say(PANIC))
    with caplog.at_level(logging.WARNING):
        assert (await host.choose()).name == "kvm"
    assert "cannot be kept" in caplog.text


async def test_only_the_verdict_is_left_behind(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    host.behave("echo dumped > core; exit 1")
    await host.choose()
    assert not list(scratch.iterdir())
    assert [file.name for file in paths.cache_dir().iterdir()] == ["accelerator.json"]
    assert not list(here.iterdir())


def test_arguments() -> None:
    assert accel.arguments("kvm") == ["-accel", "kvm", "-cpu", "host"]
    assert accel.arguments("tcg") == ["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "Nehalem,-cx16"]
    accel.arguments("kvm").append("changed by a caller")
    assert len(accel.arguments("kvm")) == 4
    with pytest.raises(HostError, match="xen"):
        accel.arguments("xen")
