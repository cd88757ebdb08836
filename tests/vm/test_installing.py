"""Other languages for a machine that exists, while it serves: put in place when their samples pass, and else not at all.

The languages of these tests are shells under other names, with the packages of `core`: their image is built already.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu.image import Recipe
from pbotvm_qemu.languages import Registry
from tests.support import assert_refused, cli, cli_json, environment, machine_qemus, popen, qemus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.vm

Env = dict[str, str]
NAME = "other-languages"
LIKE_SH = 'like = "sh"\naliases = []\ndescription = "sh under another name"\n'


def define(env: Env, name: str, text: str = "") -> None:
    """Write an operator's language file: a shell with the packages of `core`, and `text` in front."""
    folder = Path(env["XDG_CONFIG_HOME"]) / "pbotvm-qemu" / "languages"
    folder.mkdir(parents=True, exist_ok=True)
    packages = sorted({p for item in Registry.load().select("core") for p in item.packages_for("debian-trixie")})
    (folder / f"{name}.toml").write_text(f"{LIKE_SH}{text}\n[packages]\ndebian = {packages}\n".replace("'", '"'))


@pytest.fixture(scope="module")
def small(vm_env: Env) -> Iterator[Env]:
    """A machine with one language, on a file system of 1.5 GiB. The session's fixture has built the image."""
    assert vm_env
    for env in environment(NAME):
        define(env, "one")
        words = ["-t", "tmpfs", "-o", "size=1500M,mode=0755", "tmpfs", env["XDG_DATA_HOME"]]
        mounted = not os.geteuid() and subprocess.run(["mount", *words], check=True).returncode == 0
        try:
            result = cli(env, "create", "--languages", "one", "--memory", "256M")
            assert result.returncode == 0, result.stderr.decode()
            assert Recipe.load(Registry.load().select("core")).id == cli_json(env, "status", "--json")["image"]
            yield env
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", env["XDG_DATA_HOME"]], check=True)


@pytest.fixture
def kept(small: Env) -> Iterator[Env]:
    """The same, kept as clones."""
    assert cli(small, "start", "--pool", "1").returncode == 0
    yield small
    cli(small, "stop")
    assert machine_qemus(small) == []


def folder(env: Env) -> Path:
    return Path(env["XDG_DATA_HOME"]) / "pbotvm-qemu" / "machines" / NAME


def homes(env: Env) -> list[str]:
    """Return the folders and files of the machine that belong to a template."""
    return sorted(
        item.name for item in folder(env).iterdir() if item.suffix not in (".json", ".log") and item.name != "clones"
    )


def languages(env: Env) -> list[str]:
    found: list[str] = cli_json(env, "status", "--json")["languages"]
    return found


def run(env: Env, language: str) -> str:
    result = cli(env, "exec", f"-lang={language}", "echo", "served", "by", language)
    return result.stdout.decode() or result.stderr.decode()


def test_a_language_is_added_under_a_machine_that_serves(kept: Env) -> None:
    define(kept, "two")
    assert_refused(
        cli(kept, "exec", "-lang=two", "echo x"), 2, "'two' is not supported", f"languages add two --vm {NAME}"
    )
    failed = []
    done = threading.Event()

    def call() -> None:
        while not done.is_set():
            if (said := run(kept, "one")) != "served by one\n":
                failed.append(said)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        result = cli(kept, "languages", "add", "two")
    finally:
        done.set()
        caller.join()
    said = result.stderr.decode()
    assert result.returncode == 0, said
    assert failed == []
    for stage in ("booting the guest", "warming up two", "trying two", "putting it in place"):
        assert f"% ] {stage}" in said.replace(" %]", "% ]"), said
    assert f"machine {NAME} has two now" in said
    assert "the image has " in said
    assert "from its next clone on" in said
    assert run(kept, "two") == "served by two\n"
    assert run(kept, "one") == "served by one\n"
    assert_refused(cli(kept, "languages", "add", "two"), 125, "has two already")
    cli(kept, "prune")
    assert len(homes(kept)) == 1, "the old template is gone"


def test_a_session_keeps_the_template_that_it_came_from(kept: Env) -> None:
    define(kept, "three")
    session = cli(kept, "session", "open").stdout.decode().strip()
    assert cli(kept, "session", "save", session, "here").returncode == 0
    before = homes(kept)
    assert cli(kept, "languages", "add", "three").returncode == 0
    assert set(homes(kept)) > set(before)
    cli(kept, "prune")
    assert set(homes(kept)) > set(before), "a template in use is not pruned"
    assert cli(kept, "session", "revert", session, "here").returncode == 0
    assert cli(kept, "exec", "--session", session, "-lang=sh", "true").returncode == 2
    assert cli(kept, "exec", "--session", session, "-lang=one", "echo still").stdout == b"still\n"
    assert cli(kept, "session", "end", session).returncode == 0
    assert run(kept, "three") == "served by three\n"
    cli(kept, "prune")
    assert len(homes(kept)) == 1


def test_a_language_is_removed_from_a_machine_that_stands_still(small: Env) -> None:
    changed = cli_json(small, "languages", "remove", "three", "--json")
    assert (changed["removed"], "three" in changed["languages"], changed["kept"]) == (["three"], False, False)
    assert cli(small, "exec", "-lang=three", "true").returncode == 2
    assert run(small, "one") == "served by one\n"
    assert len(homes(small)) == 1


def test_a_sample_that_fails_leaves_the_old_machine(kept: Env) -> None:
    before = (homes(kept), languages(kept))
    define(kept, "wrong-sample", '[sample]\ncode = "echo hello world"\noutput = "good morning\\n"\n')
    assert_refused(cli(kept, "languages", "add", "wrong-sample"), 125, "wrong-sample", "hello world")
    define(kept, "wrong-row", '[tests]\nstatus = "exit 4"\n')
    assert_refused(cli(kept, "languages", "add", "wrong-row"), 125, "wrong-row", "'status'", "exit status 4")
    assert (homes(kept), languages(kept)) == before
    assert run(kept, "one") == "served by one\n"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_whoever_is_interrupted_leaves_the_old_machine(kept: Env, how: signal.Signals) -> None:
    before = (homes(kept), languages(kept))
    define(kept, "slow", 'warm = "sleep 900"\n')  # still under way when the signal comes, on a busy host too
    with popen(kept, "languages", "add", "slow") as change:
        assert change.stderr
        for line in change.stderr:
            if b"warming up slow" in line:
                break
        assert_refused(cli(kept, "languages", "add", "slow"), 125, "is being changed by process")
        assert_refused(cli(kept, "rm", NAME, "--force"), 125, "is being changed by process")
        change.send_signal(how)
        said = change.stderr.read()
    assert change.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), said
    assert run(kept, "one") == "served by one\n"
    pruned = cli(kept, "prune").stdout.decode()
    assert ("build-" in pruned) == (how == signal.SIGKILL), pruned
    assert (homes(kept), languages(kept)) == before
    assert {*qemus(f"machines/{NAME}/")} <= {*machine_qemus(kept)}, "no QEMU of the new template is left"
    assert run(kept, "one") == "served by one\n"


def test_an_interrupt_before_the_swap_leaves_the_old_machine(small: Env) -> None:
    """Somebody has the machine alone, and so it is interrupted at the last moment before."""
    before = (homes(small), languages(small))
    define(small, "six")
    lock = Path(small["XDG_RUNTIME_DIR"]) / "pbotvm-qemu" / "machines" / f"{NAME}.lock"
    with lock.open("w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with popen(small, "languages", "add", "six") as change:
            said = until(change, b"putting it in place")
            change.send_signal(signal.SIGINT)
            said += change.stderr.read() if change.stderr else b""
    assert change.returncode == 130, said
    assert said.endswith(b"interrupted; the machine is as it was\n"), said
    assert (homes(small), languages(small)) == before
    assert "build-" not in cli(small, "prune").stdout.decode()
    assert run(small, "one") == "served by one\n"


def test_an_interrupt_after_the_swap_comes_too_late(kept: Env) -> None:
    """The keeper stands still, and so it is interrupted between the swap and the keeper's learning of it."""
    define(kept, "six")
    keeper = cli_json(kept, "status", "--json")["pid"]
    with popen(kept, "languages", "add", "six") as change:
        said = until(change, b"trying six")
        os.kill(keeper, signal.SIGSTOP)
        try:
            said += until(change, b"putting it in place")
            until_true(lambda: "six" in json.loads((folder(kept) / "machine.json").read_text())["languages"])
            change.send_signal(signal.SIGINT)
            said += until(change, b"in place already")
        finally:
            os.kill(keeper, signal.SIGCONT)
        said += change.stderr.read() if change.stderr else b""
    assert change.returncode == 0, said
    assert b"the interrupt came too late" in said, said
    assert f"machine {NAME} has six now".encode() in said, said
    assert b"from its next clone on" in said, said
    assert b"as it was" not in said, said
    assert run(kept, "six") == "served by six\n"
    cli(kept, "prune")
    assert len(homes(kept)) == 1, "the old template is gone"


def until(process: subprocess.Popen[bytes], words: bytes) -> bytes:
    """Return what the process says on standard error up to the line with `words`."""
    said = b""
    assert process.stderr
    for line in process.stderr:
        said += line
        if words in line:
            return said
    raise AssertionError(said)


def until_true(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_machine_on_its_own_disk_is_told_to_stop_first(small: Env) -> None:
    define(small, "five")
    assert cli(small, "start", "--revert", "restart").returncode == 0
    try:
        assert_refused(cli(small, "languages", "add", "five"), 125, "in the way restart", f"stop {NAME}")
        assert cli(small, "snapshot", "create", "mine").returncode == 0
    finally:
        cli(small, "stop")
    assert_refused(cli(small, "languages", "add", "five"), 125, "snapshots that would be lost: mine")
    assert cli(small, "snapshot", "delete", "mine").returncode == 0


def test_what_cannot_be_is_refused_at_once(small: Env) -> None:
    assert_refused(cli(small, "languages", "add", "qbasic"), 2, "qbasic cannot be added", "Debian has no package")
    assert_refused(cli(small, "languages", "add", "klingon"), 2, "'klingon' is not supported")
    assert_refused(cli(small, "languages", "remove", "klingon"), 2, "'klingon' is not supported")
    assert_refused(cli(small, "languages", "remove", *languages(small)), 125, "no language left", f"rm {NAME}")


@pytest.mark.parametrize("moment", [None, b"booting the guest"])
def test_a_disk_that_is_full_leaves_the_old_machine(kept: Env, moment: bytes | None) -> None:
    if os.geteuid():
        pytest.skip("needs root to mount a tmpfs")
    define(kept, "five")
    before = (homes(kept), languages(kept))
    filler = Path(kept["XDG_DATA_HOME"]) / "filler"
    if moment is None:
        fill(filler)
    said = b""
    with popen(kept, "languages", "add", "five") as change:
        assert change.stderr
        for line in change.stderr:
            said += line
            if moment is not None and moment in line:
                fill(filler)
    assert change.returncode == 125, said
    assert b"error: " in said, said
    assert b"hint: " in said, said
    assert b"Traceback" not in said, said
    assert (homes(kept), languages(kept)) == before
    filler.unlink()
    assert run(kept, "one") == "served by one\n"


def fill(filler: Path) -> None:
    """Take all that is free, while others write too."""
    with filler.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
