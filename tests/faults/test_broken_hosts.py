"""Broken files, full disks, wrong words: a clear answer, and nothing is lost or left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import paths
from tests.support import PROGRAM, assert_refused, cli, popen, qemus

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.vm

Env = dict[str, str]


def machine_folder(env: Env) -> Path:
    return Path(env["XDG_DATA_HOME"]) / "pbotvm-qemu" / "machines" / env["PBOTVM_DOMAIN"]


@pytest.fixture
def own_image(vm_env: Env, tmp_path: Path) -> Iterator[tuple[Env, Path]]:
    """The machine with a private copy of its image, which a test may damage."""
    record = machine_folder(vm_env) / "machine.json"
    id_ = json.loads(record.read_text())["image"]
    cache = Path(vm_env["XDG_DATA_HOME"]).parent / "cache"
    copy = cache / "pbotvm-qemu" / "images" / id_
    shutil.copytree(paths.images() / id_, copy)
    yield vm_env | {"XDG_CACHE_HOME": str(cache)}, copy
    shutil.rmtree(cache)


def test_an_unknown_language_lists_those_installed(vm_env: Env) -> None:
    result = cli(vm_env, "exec", "-lang=cobol", "x")
    assert_refused(
        result, 2, "Language 'cobol' is not supported.", "bash, bc, c11, lua, perl, python, python3, sh, tcl"
    )


def test_an_unknown_machine_lists_those_there_are(vm_env: Env) -> None:
    assert_refused(cli(vm_env, "exec", "--vm", "nowhere", "-lang=sh", "true"), 125, "nowhere", "test-vm", "create")


@pytest.mark.parametrize("code", ["", "   "])
def test_empty_code_is_refused(vm_env: Env, code: str) -> None:
    assert_refused(cli(vm_env, "exec", "-lang=sh", code), 2, "no code")


def test_ten_megabytes_of_code_are_refused(vm_env: Env) -> None:
    assert_refused(cli(vm_env, "exec", "-lang=sh", "-", data=b"#" * (10 << 20)), 2, "longer than")


def test_nul_and_invalid_utf8_in_code_reach_the_interpreter(vm_env: Env) -> None:
    result = cli(vm_env, "exec", "-lang=python3", "-", data=b"# -*- coding: latin-1 -*-\nprint(ascii('\xff'))\n")
    assert result.stdout == b"'\\xff'\n"
    nul = cli(vm_env, "exec", "-lang=python3", "-", data=b"print(1)\0\n")
    assert nul.returncode == 1
    assert b"null bytes" in nul.stderr


def test_a_config_file_with_an_unknown_key_is_named(vm_env: Env, tmp_path: Path) -> None:
    folder = tmp_path / "pbotvm-qemu"
    folder.mkdir()
    (folder / "config.toml").write_text("[limits]\nwal = 3\n")
    assert_refused(
        cli(vm_env | {"XDG_CONFIG_HOME": str(tmp_path)}, "exec", "-lang=sh", "true"), 2, "config.toml", "'wal'"
    )


def test_a_bad_environment_variable_is_named(vm_env: Env) -> None:
    assert_refused(cli(vm_env | {"PBOTVM_TIMEOUT": "soon"}, "exec", "-lang=sh", "true"), 2, "PBOTVM_TIMEOUT", "soon")


def test_a_missing_kernel_is_named(own_image: tuple[Env, Path]) -> None:
    env, image = own_image
    (image / "vmlinuz").unlink()
    assert_refused(cli(env, "exec", "-lang=sh", "true"), 125, "vmlinuz", "create --force")


def test_a_truncated_image_is_refused(own_image: tuple[Env, Path]) -> None:
    env, image = own_image
    os.truncate(image / "root.qcow2", 1000)
    assert_refused(cli(env, "exec", "-lang=sh", "true"), 125, "root.qcow2", "damaged", "create --force")


def test_another_qemu_than_the_snapshots_is_refused_by_name(vm_env: Env, tmp_path: Path) -> None:
    record = machine_folder(vm_env) / "machine.json"
    before = record.read_text()
    qemu = shutil.copy("/usr/bin/qemu-system-x86_64", tmp_path / "qemu-system-x86_64")
    try:
        record.write_text(json.dumps(json.loads(before) | {"qemu": str(qemu)}))
        assert_refused(cli(vm_env, "exec", "-lang=sh", "true"), 125, "another QEMU program", "create --force")
    finally:
        record.write_text(before)


def test_a_damaged_record_is_named_and_the_other_commands_go_on(vm_env: Env) -> None:
    record = machine_folder(vm_env) / "machine.json"
    before = record.read_text()
    try:
        record.write_text(before[: len(before) // 2])
        assert_refused(cli(vm_env, "exec", "-lang=sh", "true"), 125, "damaged", "create --force")
        assert b"damaged" in cli(vm_env, "list").stdout
    finally:
        record.write_text(before)


def test_without_qemu_the_package_is_named(vm_env: Env) -> None:
    """In a mount namespace of its own, QEMU is hidden by an empty file that cannot be executed."""
    if os.geteuid():
        pytest.skip("needs root for a mount namespace")
    script = 'mount --bind /dev/null /usr/bin/qemu-system-x86_64 && exec "$@"'
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *PROGRAM, "create", "no-qemu"],
        env=vm_env, capture_output=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert_refused(result, 125, "qemu-system-x86_64", "apt-get install qemu-system-x86")
    assert not (machine_folder(vm_env).parent / "no-qemu").exists()
    assert cli(vm_env, "prune").stdout == b"nothing was left behind\n"


def test_no_disk_space_is_told_before_work_begins(vm_env: Env) -> None:
    if os.geteuid():
        pytest.skip("needs root for a mount namespace")
    script = 'mount -t tmpfs -o size=64M tmpfs "$XDG_DATA_HOME" && exec "$@"'
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *PROGRAM, "create", "no-room"],
        env=vm_env, capture_output=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert_refused(result, 125, "free space", "XDG_DATA_HOME")
    assert cli(vm_env, "prune").stdout == b"nothing was left behind\n"


def test_create_refuses_an_existing_name(vm_env: Env) -> None:
    assert_refused(cli(vm_env, "create"), 125, "exists already", "--force")


def test_ctrl_c_during_create_leaves_nothing(vm_env: Env) -> None:
    child = popen(vm_env, "create", "interrupted")
    assert child.stderr
    while line := child.stderr.readline():
        if b"booting" in line:
            break
    child.send_signal(signal.SIGINT)
    _out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err.endswith(b"interrupted; nothing was left behind\n"), err
    assert not (machine_folder(vm_env).parent / "interrupted").exists()
    assert not list(qemus("guest=interrupted"))
    assert cli(vm_env, "prune").stdout == b"nothing was left behind\n"


def test_create_killed_in_the_middle_is_named_and_removed_by_prune(vm_env: Env) -> None:
    child = popen(vm_env, "create", "killed")
    assert child.stderr
    while line := child.stderr.readline():
        if b"booting" in line:
            break
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    until = time.monotonic() + 20
    while qemus("guest=killed") and time.monotonic() < until:
        time.sleep(0.05)
    assert qemus("guest=killed") == []
    assert_refused(cli(vm_env, "exec", "--vm", "killed", "-lang=sh", "true"), 125, "never finished")
    assert b"never finished" in cli(vm_env, "prune").stdout
    assert cli(vm_env, "prune").stdout == b"nothing was left behind\n"


def test_qemu_killed_during_exec_is_told_with_its_log(vm_env: Env) -> None:
    child = popen(vm_env, "exec", "-lang=sh", "echo begun; sleep 60")
    assert child.stdout
    assert child.stdout.readline() == b"begun\n"
    (pid,) = qemus(vm_env["XDG_DATA_HOME"])
    os.kill(pid, signal.SIGKILL)
    _out, err = child.communicate(timeout=60)
    assert child.returncode == 125
    assert b"QEMU died (SIGKILL)" in err
    assert b"its log" in err
    assert cli(vm_env, "exec", "-lang=sh", "echo healed").stdout == b"healed\n"
    assert cli(vm_env, "prune").stdout == b"nothing was left behind\n"


def test_exec_interrupted_leaves_no_qemu(vm_env: Env) -> None:
    child = popen(vm_env, "exec", "-lang=sh", "echo begun; sleep 60")
    assert child.stdout
    assert child.stdout.readline() == b"begun\n"
    child.send_signal(signal.SIGINT)
    _out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"Traceback" not in err
    assert qemus(vm_env["XDG_DATA_HOME"]) == []


def test_a_qemu_that_is_stopped_is_noticed_before_the_deadline(vm_env: Env) -> None:
    """SIGSTOP: QEMU is there and silent."""
    child = popen(vm_env, "exec", "--timeout", "600", "-lang=sh", "echo begun; sleep 600")
    assert child.stdout
    assert child.stdout.readline() == b"begun\n"
    (pid,) = qemus(vm_env["XDG_DATA_HOME"])
    os.kill(pid, signal.SIGSTOP)
    _out, err = child.communicate(timeout=60)
    assert child.returncode == 125
    assert b"was stopped (SIGSTOP)" in err
    assert qemus(vm_env["XDG_DATA_HOME"]) == []


def test_ctrl_c_while_the_image_is_built_leaves_nothing(vm_env: Env) -> None:
    cache = Path(vm_env["XDG_DATA_HOME"]).parent / "empty-cache"
    cache.mkdir(mode=0o755)
    child = popen(vm_env | {"XDG_CACHE_HOME": str(cache)}, "create", "never-built")
    assert child.stderr
    while line := child.stderr.readline():
        if b"base system" in line or b"packages" in line:
            break
    child.send_signal(signal.SIGINT)
    _out, err = child.communicate(timeout=120)
    assert child.returncode == 130
    assert b"Traceback" not in err
    assert [entry.name for entry in (cache / "pbotvm-qemu" / "images").iterdir()] == []
    assert str(cache) not in Path("/proc/mounts").read_text()
    shutil.rmtree(cache)
    assert cli(vm_env, "prune").stdout == b"nothing was left behind\n"


def test_the_console_is_refused_when_there_is_none_and_ends_with_ctrl_c(vm_env: Env) -> None:
    assert_refused(cli(vm_env, "console"), 125, "not running")
    assert cli(vm_env, "start").returncode == 0
    assert_refused(cli(vm_env, "console"), 125, "clones", "--revert restart")
    cli(vm_env, "stop")
    assert cli(vm_env, "start", "--revert", "restart").returncode == 0
    child = popen(vm_env, "console")
    try:
        time.sleep(1.5)  # nothing tells when it is connected; too early only makes the test weaker
        child.send_signal(signal.SIGINT)
        assert child.wait(30) in (0, 130)
    finally:
        child.communicate(timeout=30)
        cli(vm_env, "stop")
