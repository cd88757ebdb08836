"""The same with the QEMU of a later Debian, which restores through descriptor sets and maps memory read-only."""

from __future__ import annotations

import asyncio
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import image
from tests.support import cli, cli_json, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.vm

Env = dict[str, str]
SUITE = "trixie"
_LIBRARIES = "usr/lib/x86_64-linux-gnu"


def host_version() -> tuple[int, int]:
    said = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


def install(root: Path, programs: Path) -> None:
    """Unpack QEMU of the later suite below `root`, and put programs that call it into the folder `programs`."""
    mirror = asyncio.run(image._debian_mirror())
    argv = ["mmdebstrap", "--variant=extract", "--include=qemu-system-x86,qemu-utils", SUITE, str(root)]
    subprocess.run([*argv, *([mirror] if mirror else [])], check=True, capture_output=True, timeout=600)
    root.chmod(0o755)
    programs.mkdir()
    folders = " ".join(f"-L {root}/usr/share/{name}" for name in ("qemu", "seabios", "ipxe/qemu"))
    for name, options in (("qemu-system-x86_64", folders), ("qemu-img", "")):
        (programs / name).write_text(
            f"#!/bin/sh\nexport QEMU_MODULE_DIR={root}/{_LIBRARIES}/qemu\n"
            f"exec {root}/usr/lib64/ld-linux-x86-64.so.2 --library-path {root}/{_LIBRARIES}:{root}/{_LIBRARIES}/pulseaudio "
            f'{root}/usr/bin/{name} {options} "$@"\n'
        )
        (programs / name).chmod(0o755)


@pytest.fixture(scope="module")
def newer_env(vm_env: Env) -> Iterator[Env]:
    """A machine that was made with the later QEMU."""
    assert vm_env  # which has built the image
    if host_version() >= (9, 1):
        pytest.skip("the host's own QEMU is new: the other tests have tried it")
    for env in environment("newer-qemu"):
        base = Path(env["XDG_DATA_HOME"]).parent
        install(base / "root", base / "bin")
        env["PATH"] = f"{base / 'bin'}:{env['PATH']}"
        result = cli(env, "create")
        assert result.returncode == 0, result.stderr.decode()
        yield env


def test_clones_start_from_memory_that_qemu_cannot_change(newer_env: Env) -> None:
    report = cli_json(newer_env, "exec", "--json", "-lang=python3", "print(6 * 7)")
    assert (report["stdout"], report["revert"]) == ("42\n", "clone")
    assert b"readonly=on,rom=off" in cli(newer_env, "qemu-command").stdout
    ram = Path(newer_env["XDG_DATA_HOME"]) / "pbotvm-qemu/machines/newer-qemu/template/ram"
    assert ram.stat().st_mode & 0o222 == 0


def test_sessions_are_saved_reverted_and_forked(newer_env: Env) -> None:
    assert cli(newer_env, "start").returncode == 0
    first = cli(newer_env, "session", "open").stdout.decode().strip()
    assert cli(newer_env, "exec", "--session", first, "-lang=sh", "echo one > note").returncode == 0
    assert cli(newer_env, "session", "save", first, "a").returncode == 0
    assert cli(newer_env, "exec", "--session", first, "-lang=sh", "echo two > note").returncode == 0
    second = cli(newer_env, "session", "fork", first).stdout.decode().strip()
    assert cli(newer_env, "session", "revert", first, "a").returncode == 0
    notes = [cli(newer_env, "exec", "--session", one, "-lang=sh", "cat note").stdout for one in (first, second)]
    assert notes == [b"one\n", b"two\n"]
    assert cli(newer_env, "stop").returncode == 0


@pytest.mark.parametrize("way", ["restart", "loadvm"])
def test_snapshots_bring_the_machine_back(newer_env: Env, way: str) -> None:
    assert cli(newer_env, "start", "--revert", way).returncode == 0
    for number in range(2):
        report = cli_json(newer_env, "exec", "--json", "-lang=sh", f"ls /tmp; touch /tmp/mark; echo {number}")
        assert (report["stdout"], report["revert"]) == (f"{number}\n", way)
    assert cli(newer_env, "stop").returncode == 0
