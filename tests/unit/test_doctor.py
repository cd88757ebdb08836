"""The host checks, against a QEMU that speaks real QMP but is a script, and a host that is made up where it matters."""

from __future__ import annotations

import json
import os
import pwd
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pbotvm_qemu import accel, doctor, paths, process
from pbotvm_qemu.config import LOOPBACK, Config, MachineConfig, PoolConfig, RelayConfig
from pbotvm_qemu.doctor import Features
from pbotvm_qemu.errors import CommandError, HostError, LaunchError, MonitorError
from pbotvm_qemu.network import netprobe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GIB = 1 << 30

COMMANDS = ("snapshot-save", "snapshot-load", "migrate-incoming", "add-fd", "query-version")
DEVICES = ("virtio-blk-pci", "virtio-serial-pci", "virtserialport", "virtio-rng-pci", "isa-serial", "vmgenid",
           "vhost-vsock-pci")  # fmt: skip

# Reads its behaviour from the JSON file beside it, and its socket's number from its arguments, as QEMU does.
FAKE = """#!{python}
import json, os, socket, sys, time
here = os.path.dirname(os.path.abspath(__file__))
play = json.load(open(here + "/play.json"))
open(here + "/pids", "a").write(str(os.getpid()) + "\\n")
words = " ".join(sys.argv)
if play.get("dies") or ("-sandbox" in sys.argv and play.get("no_sandbox")):
    sys.exit("qemu-system-x86_64: " + (play.get("dies") or play["no_sandbox"]))
if play.get("silent"):
    time.sleep(60)
sock = socket.socket(fileno=int(words.split("fd=")[1].split()[0]))
sock.sendall(b'{{"QMP": {{"version": {{}}, "capabilities": []}}}}\\n')
text = ""
while chunk := sock.recv(65536):
    text += chunk.decode()
    while text.strip():
        try:
            request, end = json.JSONDecoder().raw_decode(text.lstrip())
        except ValueError:
            break
        text = text.lstrip()[end:]
        answer = play["answers"].get(request["execute"], {{}})
        reply = {{"return": answer}} | {{key: request[key] for key in request if key == "id"}}
        sock.sendall(json.dumps(reply).encode() + b"\\n")
"""


class FakeQemu:
    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.path = str(folder / "qemu-system-x86_64")
        Path(self.path).write_text(FAKE.format(python=sys.executable))
        Path(self.path).chmod(0o755)
        self.play()

    def play(self, *, answers: dict[str, Any] | None = None, **changes: object) -> None:
        good: dict[str, Any] = {
            "query-version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": "Debian"},
            "query-commands": [{"name": name} for name in COMMANDS],
            "qom-list-types": [{"name": name, "parent": "device"} for name in DEVICES],
        }
        (self.folder / "play.json").write_text(json.dumps({"answers": good | (answers or {})} | changes))

    def all_gone(self) -> bool:
        pids = [int(line) for line in (self.folder / "pids").read_text().split()]
        return bool(pids) and not any(process.Identity.of(pid) for pid in pids)


@pytest.fixture
def qemu(tmp_path: Path) -> FakeQemu:
    return FakeQemu(tmp_path / "bin")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server((LOOPBACK, 0)) as server:
        yield int(server.getsockname()[1])


def unused_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as server:
        return int(server.getsockname()[1])


def ports(relay: int, serial: int, health: int) -> Config:
    return Config(machine=MachineConfig(serial=serial, health=health), relay=RelayConfig(port=relay))


def features(**changes: object) -> Features:
    good = Features((7, 2, 22), "Debian", frozenset(COMMANDS), frozenset(DEVICES), None)
    return replace(good, **changes)  # type: ignore[arg-type]


# QEMU ---------------------------------------------------------------------------------------------------------------


async def test_qemu_is_asked_and_ends(qemu: FakeQemu) -> None:
    found = await doctor.ask_qemu(qemu.path)
    assert found == features()
    assert qemu.all_gone()


async def test_without_a_sandbox_qemu_is_asked_all_the_same(qemu: FakeQemu) -> None:
    qemu.play(no_sandbox="-sandbox support is not enabled in this QEMU binary")
    found = await doctor.ask_qemu(qemu.path)
    assert found.commands == frozenset(COMMANDS)
    assert found.sandbox_problem is not None
    assert "not enabled in this QEMU binary" in found.sandbox_problem
    check = doctor.judge_features(found)
    assert check.status == "fail"
    assert "not enabled in this QEMU binary" in check.detail
    assert qemu.all_gone()


async def test_qemu_that_dies_says_why(qemu: FakeQemu) -> None:
    qemu.play(dies="libfdt.so.1: cannot open shared object file")
    with pytest.raises(LaunchError, match=r"status 1.*libfdt"):
        await doctor.ask_qemu(qemu.path)


async def test_qemu_that_is_silent_is_given_up_and_killed(qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_QMP_TIMEOUT", 0.3)
    qemu.play(silent=True)
    started = time.monotonic()
    with pytest.raises(LaunchError, match="did not answer in time"):
        await doctor.ask_qemu(qemu.path)
    assert time.monotonic() - started < 10
    assert qemu.all_gone()


async def test_qemu_that_cannot_be_executed(qemu: FakeQemu) -> None:
    Path(qemu.path).chmod(0o644)
    with pytest.raises(CommandError, match="cannot be started"):
        await doctor.ask_qemu(qemu.path)


@pytest.mark.parametrize(
    "answers",
    [
        {"query-version": []},
        {"query-version": {"qemu": {"major": "seven"}}},
        {"query-commands": {}},
        {"qom-list-types": [{"parent": "device"}]},
        {"qom-list-types": ["virtio-blk-pci"]},
    ],
)
async def test_nonsense_from_qemu_is_an_error_of_ours(qemu: FakeQemu, answers: dict[str, object]) -> None:
    qemu.play(answers=answers)
    with pytest.raises(MonitorError, match="makes no sense"):
        await doctor.ask_qemu(qemu.path)
    assert qemu.all_gone()


@pytest.mark.parametrize(
    ("version", "status"),
    [((5, 2, 0), "warn"), ((7, 1, 9), "warn"), ((7, 2, 0), "ok"), ((8, 0, 0), "ok"), ((10, 0, 2), "ok")],
)
def test_an_old_qemu_is_warned_about(version: tuple[int, int, int], status: str) -> None:
    check = doctor.judge_version("/usr/bin/qemu", features(version=version))
    assert check.status == status
    assert ".".join(map(str, version)) in check.detail
    assert (check.hint is None) == (status == "ok")


@pytest.mark.parametrize(
    ("missing", "status"),
    [("snapshot-save", "fail"), ("snapshot-load", "fail"), ("virtserialport", "fail"), ("vmgenid", "fail"),
     ("virtio-blk-pci", "fail"), ("virtio-rng-pci", "fail"), ("isa-serial", "fail"), ("virtio-serial-pci", "fail"),
     ("migrate-incoming", "warn"), ("add-fd", "warn"), ("vhost-vsock-pci", "warn")],
)  # fmt: skip
def test_a_missing_feature_is_named(missing: str, status: str) -> None:
    check = doctor.judge_features(
        features(commands=frozenset(COMMANDS) - {missing}, devices=frozenset(DEVICES) - {missing})
    )
    assert check.status == status
    assert missing in check.detail
    assert check.hint


def test_all_features() -> None:
    assert doctor.judge_features(features()).status == "ok"


# accelerator --------------------------------------------------------------------------------------------------------


def answer_with(monkeypatch: pytest.MonkeyPatch, verdict: accel.Verdict) -> None:
    async def choose(qemu: str, kernel: Path | None) -> accel.Verdict:
        return verdict

    monkeypatch.setattr(accel, "choose", choose)


async def test_tcg_is_a_warning_that_names_the_reason_and_the_risk(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, accel.Verdict("tcg", "KVM internal error. Suberror: 1", probed=True))
    (check,) = await doctor._kvm("/usr/bin/qemu", None)
    assert check.status == "warn"
    assert "KVM internal error. Suberror: 1" in check.detail
    assert "security boundary" in check.detail


@pytest.mark.parametrize(
    ("mode", "euid", "status"), [(0o660, 0, "ok"), (0o666, 0, "ok"), (0o600, 0, "fail"), (0o600, 1000, "ok")]
)
async def test_kvm_must_also_be_open_to_who_runs_qemu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, euid: int, status: str
) -> None:
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(mode)
    monkeypatch.setattr(accel, "DEVICE", device)
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    answer_with(monkeypatch, accel.Verdict("kvm", "a kernel booted under KVM", probed=True))
    (check,) = await doctor._kvm("/usr/bin/qemu", None)
    assert check.status == status


# the rest of the host -----------------------------------------------------------------------------------------------


async def test_free_ports() -> None:
    (check,) = await doctor._ports(ports(unused_port(), 0, 0))
    assert check.status == "ok"
    (check,) = await doctor._ports(ports(0, 0, 0))
    assert (check.status, check.detail) == ("ok", "none is wanted")


async def test_a_taken_port_names_its_holder(listener: int) -> None:
    (check,) = await doctor._ports(ports(unused_port(), listener, 0))
    assert check.status == "warn"
    assert f"serial port {listener} is held by pid {os.getpid()} (" in check.detail
    assert "relay" not in check.detail


async def test_a_taken_port_of_somebody_invisible(listener: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "listening_pid", lambda port: None)
    (check,) = await doctor._ports(ports(listener, 0, 0))
    assert check.status == "warn"
    assert f"relay port {listener} " in check.detail


async def test_one_port_for_two_purposes() -> None:
    port = unused_port()
    (check,) = await doctor._ports(ports(port, port, 0))
    assert check.status == "fail"


@pytest.mark.parametrize(
    ("data", "cache", "status"),
    [(9 * GIB, 9 * GIB, "ok"), (9 * GIB, 7 * GIB, "warn"), (1 * GIB, 9 * GIB, "fail"), (9 * GIB, 2 * GIB - 1, "fail")],
)
async def test_disk(monkeypatch: pytest.MonkeyPatch, data: int, cache: int, status: str) -> None:
    monkeypatch.setattr(doctor, "free_space", {paths.data_dir(): data, paths.cache_dir(): cache}.__getitem__)
    (check,) = await doctor._disk()
    assert check.status == status
    assert (check.hint is None) == (status == "ok")


def test_free_space_of_a_folder_to_be_made(tmp_path: Path) -> None:
    assert doctor.free_space(tmp_path / "not" / "yet" / "there") > 0
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(("available", "status"), [(GIB, "ok"), (513 << 20, "warn"), (511 << 20, "fail")])
async def test_memory(monkeypatch: pytest.MonkeyPatch, available: int, status: str) -> None:
    monkeypatch.setattr(process, "memory_available", lambda: available)
    (check,) = await doctor._memory(Config(machine=MachineConfig(memory=512 << 20)))
    assert check.status == status


def without(*names: str) -> Callable[..., str]:
    def find(name: str, *, package: str) -> str:
        if name in names:
            raise HostError(f"the program {name} is not installed", hint=f"apt-get install {package}")
        return f"/usr/bin/{name}"

    return find


@pytest.mark.parametrize(("euid", "status"), [(0, "ok"), (1000, "fail")])
async def test_ordinary_users_need_more_tools(monkeypatch: pytest.MonkeyPatch, euid: int, status: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    monkeypatch.setattr(process, "find_program", without("fakeroot", "newuidmap"))
    (check,) = await doctor._image_tools()
    assert check.status == status
    assert euid == 0 or check.hint == "apt-get install fakeroot uidmap"


async def test_missing_tools_come_as_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(process, "find_program", without("mke2fs", "qemu-img"))
    (check,) = await doctor._image_tools()
    assert check.status == "fail"
    assert check.hint == "apt-get install e2fsprogs qemu-utils"


async def test_who_qemu_runs_as(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert (await doctor._privileges())[0].status == "ok"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", {"root": pwd.getpwuid(0)}.__getitem__)
    (check,) = await doctor._privileges()
    assert check.status == "warn"
    assert "useradd --system" in (check.hint or "")
    monkeypatch.setattr(pwd, "getpwnam", {"pbotvm": pwd.getpwuid(0)}.__getitem__)
    assert (await doctor._privileges())[0].status == "ok"


async def test_vsock_can_do_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_VSOCK", tmp_path / "vhost-vsock")
    (check,) = await doctor._vsock(Config())
    assert (check.status, check.hint) == ("warn", "modprobe vhost_vsock")
    assert (await doctor._vsock(Config(machine=MachineConfig(cid=0))))[0].status == "ok"
    (tmp_path / "vhost-vsock").touch()
    assert (await doctor._vsock(Config()))[0].status == "ok"


async def test_network_problems_only_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    async def capabilities() -> tuple[netprobe.Capability, ...]:
        return (
            netprobe.Capability("tun", ok=True, why="made"),
            netprobe.Capability("bridge", ok=False, why="denied", hint="run as root"),
        )

    monkeypatch.setattr(netprobe, "capabilities", capabilities)
    tun, bridge = await doctor._network()
    assert (tun.status, tun.hint) == ("ok", None)
    assert (bridge.status, bridge.hint) == ("warn", "run as root")
    assert "denied" in bridge.detail


# all of it ----------------------------------------------------------------------------------------------------------

NAMES = ["cpu", "kvm", "qemu", "qemu-features", "vhost-vsock", "vhost-user-vsock", "virtio-serial", "isa-serial",
         "tun", "bridge", "nftables", "bridge-helper", "user-network", "image-tools", "setpriv", "privileges", "images",
         "templates", "disk", "memory", "ports"]  # fmt: skip


@pytest.fixture
def made_up_host(qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch) -> FakeQemu:
    async def capabilities() -> tuple[netprobe.Capability, ...]:
        return tuple(
            netprobe.Capability(name, ok=True, why="")
            for name in NAMES[NAMES.index("tun") : NAMES.index("image-tools")]
        )

    monkeypatch.setattr(netprobe, "capabilities", capabilities)
    monkeypatch.setenv("PATH", str(qemu.folder), prepend=os.pathsep)
    answer_with(monkeypatch, accel.Verdict("tcg", "no /dev/kvm", probed=True))
    return qemu


async def test_every_check_in_its_place(made_up_host: FakeQemu) -> None:
    checks = {check.name: check for check in await doctor.examine(Config())}
    assert list(checks) == NAMES
    assert checks["qemu"].status == checks["qemu-features"].status == "ok"
    assert made_up_host.path in checks["qemu"].detail
    assert made_up_host.all_gone()


async def test_a_broken_qemu_fails_and_the_rest_is_still_checked(made_up_host: FakeQemu) -> None:
    made_up_host.play(dies="Illegal instruction")
    checks = {check.name: check for check in await doctor.examine(Config())}
    assert list(checks) == NAMES
    assert checks["qemu"].status == checks["qemu-features"].status == "fail"
    assert "Illegal instruction" in checks["qemu"].detail


async def test_no_qemu_at_all(made_up_host: FakeQemu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "QEMU", "qemu-system-nowhere")
    checks = {check.name: check for check in await doctor.examine(Config())}
    assert list(checks) == NAMES
    assert checks["qemu"].status == checks["qemu-features"].status == "fail"
    assert checks["kvm"].status == "warn"
    assert checks["qemu"].hint == "apt-get install qemu-system-x86"


@pytest.mark.parametrize("problem", [OSError(5, "Input/output error"), HostError("broken", hint="mend it")])
async def test_a_check_that_cannot_be_made_has_failed(
    made_up_host: FakeQemu, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    def unreadable(directory: Path) -> int:
        raise problem

    monkeypatch.setattr(doctor, "free_space", unreadable)
    checks = {check.name: check for check in await doctor.examine(Config())}
    assert list(checks) == NAMES
    assert checks["disk"].status == "fail"
    assert str(problem) in checks["disk"].detail


async def test_the_daemon_is_named_with_what_to_install_or_to_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(process, "find_program", without("vhost-device-vsock"))
    (check,) = await doctor._vhost_user(Config())
    assert check.status == "ok"
    assert "apt-get install" in (check.hint or "")
    monkeypatch.setattr(process, "find_program", without())
    (check,) = await doctor._vhost_user(Config())
    assert "--transport vhost-user-vsock" in (check.hint or "")
    (check,) = await doctor._vhost_user(Config(pool=PoolConfig(revert="restart")))
    assert (check.status, check.hint) == ("ok", None)
    (check,) = await doctor._vhost_user(Config(machine=MachineConfig(vport=0)))
    assert "not wanted" in check.detail


async def test_serial_needs_nothing_but_tells_what_is_chosen() -> None:
    virtio, isa = await doctor._serial(Config(pool=PoolConfig(transport="isa-serial")))
    assert (virtio.status, isa.status) == ("ok", "ok")
    assert "chosen" in isa.detail
    (_virtio, isa) = await doctor._serial(Config(machine=MachineConfig(serial=0)))
    assert "only for clones" in isa.detail
