"""The command line as one types it: help, mistakes, PBot's spelling, completion."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import typer.main
from typer.testing import CliRunner

from pbotvm_qemu.cli import base, entry, states
from pbotvm_qemu.cli.base import app

if TYPE_CHECKING:
    from pathlib import Path

entry.define([])
TOP = typer.main.get_command(app)
COMMANDS = sorted(getattr(TOP, "commands", {}))
SNAPSHOT = sorted(getattr(typer.main.get_command(states.snapshots), "commands", {}))


@pytest.mark.parametrize(
    "words", [[], *[[name] for name in COMMANDS], *[["snapshot", name] for name in SNAPSHOT]], ids=" ".join
)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help(words: list[str], option: str) -> None:
    result = CliRunner().invoke(app, [*words, option])
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.stdout


def test_version_is_printed() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("pbotvm-qemu ")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("exec -lang=sh echo", "exec --lang=sh -- echo"),
        ("exec -lang sh echo -lang=x", "exec --lang sh -- echo -lang=x"),
        ("exec --vm two -args x echo -args", "exec --vm two --args x -- echo -args"),
        ("exec -stdin=a -vm=b -- -lang=c", "exec --stdin=a --vm=b -- -lang=c"),
        ("exec --lang sh -", "exec --lang sh -- -"),
        ("exec -lang=c11 -Wshadow -O2 x", "exec --lang=c11 -- -Wshadow -O2 x"),
        ("client -lang=sh echo -h", "client -- -lang=sh echo -h"),
        ("client -- -lang=sh echo", "client -- -lang=sh echo"),
        ("client --help", "client --help"),
        ("exec -x -lang=c y", "exec -- -x -lang=c y"),
        ("exec --json -lang=c y", "exec --json --lang=c -- y"),
        ("status -lang=x", "status -lang=x"),
        ("exec", "exec"),
        ("-v exec -lang=sh x", "-v exec --lang=sh -- x"),
    ],
)
def test_pbot_spelling_is_understood_before_the_program_alone(typed: str, meant: str) -> None:
    assert entry.pbot_spelling(typed.split()) == meant.split()


def call(tmp_path: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    folders = {
        f"XDG_{name}": str(tmp_path / name) for name in ("DATA_HOME", "CACHE_HOME", "RUNTIME_DIR", "CONFIG_HOME")
    }
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PBOTVM_")}
    return subprocess.run(
        [sys.executable, "-m", "pbotvm_qemu", *words],
        env=kept | folders | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["exec", "--vm", "nothing", "echo"], 125, "there is no machine 'nothing'"),
        (["status", "nothing"], 125, "there is no machine 'nothing'"),
        (["rm", "nothing"], 125, "nothing"),
        (["status", "a/b"], 2, "cannot name a machine"),
        (["run", "--listen", "here"], 2, "is not ADDR:PORT"),
        (["create", "--memory", "lots"], 2, "is not a size"),
        (["create", "--cpus", "1000"], 2, "out of range"),
        (["create", "--languages", "klingon"], 2, "Language 'klingon' is not supported."),
        (["create", "--memory", "1"], 2, "out of range"),
        (["create", "--cpus", "many"], 2, "Invalid value for '--cpus'"),
        (["craete"], 2, "Did you mean 'create'"),
        (["status", "--nothing"], 2, "No such option: --nothing"),
        (["exec", "-lang=klingon", "x"], 125, "there is no machine"),
        (["client", "echo"], 125, "Fatal error: Connection refused; try again later"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_is_an_error_with_a_hint_and_no_traceback(
    tmp_path: Path, words: list[str], status: int, said: str
) -> None:
    done = call(tmp_path, *words, PBOTVM_PORT="1")
    assert done.returncode == status, done.stderr
    # PBot's vm-client says it where a bot looks for the answer.
    assert done.stdout == (f"{said}\n" if words[0] == "client" else "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert said in error


def test_mistake_in_the_environment_is_named(tmp_path: Path) -> None:
    done = call(tmp_path, "list", PBOTVM_PORT="x")
    status = call(tmp_path, "status", PBOTVM_PORT="x")
    assert done.returncode == 0
    assert status.returncode == 2
    assert "PBOTVM_PORT" in status.stderr


def test_json_reports_an_error_for_programs(tmp_path: Path) -> None:
    done = call(tmp_path, "exec", "--json", "--vm", "nothing", "echo")
    report = json.loads(done.stdout)
    assert report["exit_code"] == done.returncode == 125
    assert report["error"]
    assert report["hint"]
    assert report["kind"]


def test_no_machine_is_an_empty_list(tmp_path: Path) -> None:
    assert json.loads(call(tmp_path, "list", "--json").stdout) == {"machines": []}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_renders(tmp_path: Path, shell: str) -> None:
    done = call(tmp_path, _PBOTVM_QEMU_COMPLETE=f"source_{shell}")
    assert done.returncode == 0, done.stderr
    assert "_PBOTVM_QEMU_COMPLETE" in done.stdout


def test_languages_are_completed() -> None:
    assert base.complete_language("pe") == ["perl"]


@pytest.mark.parametrize(("words", "status"), [(["status", "nothing"], 125), (["status", "--nothing"], 2)])
def test_the_exit_status_is_right_when_nobody_reads_the_error(words: list[str], status: int) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        assert (
            subprocess.run([sys.executable, "-m", "pbotvm_qemu", *words], stderr=theirs, check=False).returncode
            == status
        )
    finally:
        os.close(theirs)


def test_machines_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    (tmp_path / "pbotvm-qemu" / "machines" / "mine").mkdir(parents=True)
    assert base.complete_machine("mi") == ["mine"]
    assert base.complete_machine("x") == []


def test_a_second_interrupt_does_not_say_that_nothing_is_left() -> None:
    async def work(*, again: bool) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(60)
        finally:
            if again:
                signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(0)

    with pytest.raises(base.Interrupted, match="interrupted; as it was"):
        base.until_done(work(again=False), undone="as it was")
    with pytest.raises(base.Interrupted, match="prune"):
        base.until_done(work(again=True))
