"""`run`, `start` and what they keep: relay, control socket, snapshots, and an orderly end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.support import LONG, PROGRAM, assert_refused, cli, cli_json, environment, free_ports, qemus

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.vm

Env = dict[str, str]


def ask(env: Env, data: bytes, *, finish: bool = False) -> bytes:
    """Send bytes to the relay as netcat does, and return all that it answers."""
    with socket.create_connection(("127.0.0.1", int(env["PBOTVM_PORT"])), timeout=120) as sock:
        sock.sendall(data)
        if finish:
            sock.shutdown(socket.SHUT_WR)
        reply = b""
        while piece := sock.recv(65536):
            reply += piece
        return reply


def test_the_relay_answers_json_in_any_spacing(kept_env: Env) -> None:
    line = b'{"nick" :"n" ,"channel" :"#c" ,"unknown":[1], "code" :"-lang=sh echo hello" }\n'
    assert ask(kept_env, line) == b"hello\n"


def test_the_relay_answers_bare_words_and_skips_blank_lines(kept_env: Env) -> None:
    assert ask(kept_env, b"\n\r\n-lang=python3 print(6*7)\r\n") == b"42\n"


def test_the_relay_takes_a_line_that_ends_with_the_connection(kept_env: Env) -> None:
    assert ask(kept_env, b"-lang=sh echo half", finish=True) == b"half\n"


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        (b"-lang=sh true\n", b"Success (no output).\n"),
        (b"-lang=sh exit 3\n", b"Exit 3.\n"),
        (b"-lang=sh echo hi; exit 3\n", b"hi\n [Exit 3]\n"),
        (b"-lang=sh -args \"'a b' c\" echo $1 -stdin x\n", b"a b\n"),
        (b"-lang=sh cat -stdin one\\ntwo\n", b"one\ntwo\n"),
        (b'{"code":""}\n', b"Usage: cc [-lang="),
        (b"-lang=nope x\n", b"Language 'nope' is not supported.\nSupported languages are: bash, bc, c11"),
        (b"-vm=other -lang=sh x\n", b"Unknown machine 'other'; available machines are: test-vm\n"),
    ],
)
def test_the_relay_words_its_replies_as_the_predecessor(kept_env: Env, line: bytes, reply: bytes) -> None:
    assert ask(kept_env, line).startswith(reply)


def test_callers_at_once_get_their_own_answers(kept_env: Env) -> None:
    answers: dict[int, bytes] = {}

    def call(number: int) -> None:
        answers[number] = ask(kept_env, f"-lang=sh echo {number}\n".encode())

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert answers == {number: f"{number}\n".encode() for number in range(8)}


def test_exec_and_client_use_the_kept_machine(kept_env: Env) -> None:
    before = cli_json(kept_env, "status", "--json")["live"]["runs"]
    assert cli(kept_env, "exec", "-lang=sh", "echo from exec").stdout == b"from exec\n"
    assert cli(kept_env, "client", "-lang=sh", "echo", "from", "client").stdout == b"from client\n"
    assert cli_json(kept_env, "status", "--json")["live"]["runs"] == before + 2


def test_every_run_on_a_kept_machine_starts_clean(kept_env: Env) -> None:
    assert cli(kept_env, "exec", "-lang=sh", "echo x > /tmp/mark; echo x > ~/mark").returncode == 0
    assert cli(kept_env, "exec", "-lang=sh", "ls /tmp/mark ~/mark").returncode == 2


def test_input_output_and_files_pass_the_control_socket(kept_env: Env) -> None:
    data = os.urandom(3 << 20)
    result = cli(kept_env, "exec", "--timeout", "60", "--get", "out:/dev/stdout", "-lang=sh", "cat > out", data=data)
    assert (result.returncode, result.stdout) == (0, data), result.stderr


def test_snapshots_are_taken_listed_reverted_and_deleted(disk_env: Env) -> None:
    kept_env = disk_env
    assert cli(kept_env, "snapshot", "create", "two").returncode == 0
    assert_refused(cli(kept_env, "snapshot", "create", "two"), 125, "already")
    assert [item["name"] for item in cli_json(kept_env, "snapshot", "list", "--json")["snapshots"]] == ["1", "two"]
    assert cli(kept_env, "snapshot", "revert", "two").returncode == 0
    assert cli_json(kept_env, "status", "--json")["live"]["snapshot"] == "two"
    assert_refused(cli(kept_env, "snapshot", "revert", "three"), 125, "no snapshot 'three'", "1, two")
    assert cli(kept_env, "exec", "-lang=sh", "echo usable").stdout == b"usable\n"
    assert cli(kept_env, "revert").returncode == 0
    assert cli(kept_env, "snapshot", "delete", "two").returncode == 0
    assert_refused(cli(kept_env, "snapshot", "delete", "two"), 125, "no snapshot 'two'")
    assert_refused(cli(kept_env, "snapshot", "delete", "1"), 125, "runs start from")
    assert cli(kept_env, "exec", "-lang=sh", "echo usable").stdout == b"usable\n"


def test_exec_keeps_a_clone_as_a_session_when_told_to(kept_env: Env) -> None:
    first = cli(kept_env, "exec", "--keep", "-lang=sh", "echo one > note")
    assert first.returncode == 0
    (listed,) = cli_json(kept_env, "session", "list", "--json")["sessions"]
    assert f"exec --session {listed['id']}".encode() in first.stderr
    report = cli_json(kept_env, "exec", "--json", "--session", listed["id"], "-lang=sh", "cat note")
    assert (report["stdout"], report["session"], report["clone"]) == ("one\n", listed["id"], listed["clone"])
    assert_refused(cli(kept_env, "session", "revert", listed["id"], "none"), 125, "no state 'none'")
    assert_refused(cli(kept_env, "session", "save", listed["id"], "x/y"), 2, "cannot name a state")
    assert_refused(cli(kept_env, "session", "open", "--idle", "0"), 2, "seconds")
    assert_refused(cli(kept_env, "exec", "--keep", "--session", "x", "-lang=sh", "true"), 2, "--keep")
    assert cli(kept_env, "session", "end", listed["id"]).returncode == 0
    assert_refused(cli(kept_env, "exec", "--session", listed["id"], "-lang=sh", "true"), 125, "no session")


def test_a_session_without_a_keeper_is_refused(vm_env: Env) -> None:
    assert_refused(cli(vm_env, "exec", "--session", "x", "-lang=sh", "true"), 125, "not kept", "start")
    assert_refused(cli(vm_env, "session", "open"), 125, "not running")


def test_a_second_keeper_is_refused(kept_env: Env) -> None:
    assert_refused(cli(kept_env, "start"), 125, "runs already")
    assert_refused(cli(kept_env, "rm"), 125, "is running")


def test_qemu_killed_in_the_middle_of_a_run_is_told_and_mended(kept_env: Env) -> None:
    child = subprocess.Popen(
        [*PROGRAM, "exec", "-lang=sh", "echo begun; sleep 60"],
        env=kept_env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout
    assert child.stdout.readline() == b"begun\n"
    for pid in qemus(kept_env["XDG_DATA_HOME"]):  # the one that runs the program, and those that are ready
        os.kill(pid, signal.SIGKILL)
    _out, err = child.communicate(timeout=60)
    assert child.returncode == 125
    assert b"QEMU died (SIGKILL)" in err
    assert b"Traceback" not in err
    assert cli(kept_env, "exec", "-lang=sh", "echo healed").stdout == b"healed\n"


def test_an_idle_qemu_that_dies_is_replaced_and_counted(kept_env: Env) -> None:
    before = cli_json(kept_env, "status", "--json")["live"]
    os.kill(before["pids"][0], signal.SIGKILL)
    assert cli(kept_env, "exec", "-lang=sh", "echo healed").stdout == b"healed\n"
    assert cli_json(kept_env, "status", "--json")["live"]["deaths"] == before["deaths"] + 1


def test_a_caller_who_hangs_up_ends_his_program(kept_env: Env) -> None:
    child = subprocess.Popen(
        [*PROGRAM, "exec", "-lang=sh", "echo begun; sleep 600"], env=kept_env, stdout=subprocess.PIPE
    )
    assert child.stdout
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert cli(kept_env, "exec", "-lang=sh", "echo served").stdout == b"served\n"


def test_a_killed_keeper_leaves_no_qemu_and_the_next_one_works(vm_env: Env) -> None:
    kept = cli_json(vm_env, "run", "--detach", "--json")
    os.kill(kept["pid"], signal.SIGKILL)
    until = time.monotonic() + 20
    while qemus(vm_env["XDG_DATA_HOME"]) and time.monotonic() < until:
        time.sleep(0.05)
    assert qemus(vm_env["XDG_DATA_HOME"]) == []
    assert b"which is gone" in cli(vm_env, "prune", "--dry-run").stdout
    assert cli(vm_env, "run", "--detach").returncode == 0
    assert cli(vm_env, "exec", "-lang=sh", "echo again").stdout == b"again\n"
    assert cli(vm_env, "stop").returncode == 0
    assert cli(vm_env, "prune").stdout == b"nothing was left behind\n"


def test_sigterm_lets_the_running_program_end(vm_env: Env) -> None:
    keeper = subprocess.Popen(
        [*PROGRAM, "run", "--json"], env=vm_env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert keeper.stdout
    assert json.loads(keeper.stdout.readline())["state"] == "running"
    child = subprocess.Popen(
        [*PROGRAM, "exec", "-lang=sh", "echo begun; sleep 1; echo done"], env=vm_env, stdout=subprocess.PIPE
    )
    assert child.stdout
    assert child.stdout.readline() == b"begun\n"
    keeper.send_signal(signal.SIGTERM)
    assert child.communicate(timeout=60)[0] == b"done\n"
    assert keeper.wait(60) == 0
    keeper.stdout.close()
    assert cli(vm_env, "prune").stdout == b"nothing was left behind\n"


@pytest.fixture
def second_env(vm_env: Env) -> Iterator[Env]:
    """A second machine beside the first, in the same folders, with its own ports."""
    serial, health, relay = free_ports(3)
    ports = {"PBOTVM_SERIAL": str(serial), "PBOTVM_HEALTH": str(health), "PBOTVM_PORT": str(relay)}
    env = vm_env | ports | {"PBOTVM_DOMAIN": "second-vm"}
    result = cli(env, "create", "--memory", "256M", "--disk-size", "2G")
    assert result.returncode == 0, result.stderr.decode()
    yield env
    cli(env, "rm", "--force")


def test_two_machines_run_at_once_by_their_names_and_ports(kept_env: Env, second_env: Env) -> None:
    assert cli(second_env, "run", "--detach").returncode == 0
    for env, name in ((kept_env, b"test-vm"), (second_env, b"second-vm")):
        assert cli(env, "exec", "-lang=sh", "hostname").stdout.startswith(name + b"-")
        assert ask(env, b"-lang=sh hostname\n").startswith(name + b"-")
        for port in ("PBOTVM_SERIAL", "PBOTVM_HEALTH"):
            socket.create_connection(("127.0.0.1", int(env[port])), timeout=10).close()
    assert cli(kept_env, "exec", "--vm", "second-vm", "-lang=sh", "hostname").stdout.startswith(b"second-vm-")
    disk = cli(second_env, "exec", "-lang=sh", "df -B1 --output=size / | tail -1").stdout
    assert 1.5e9 < int(disk) < 2.2e9
    cli(second_env, "stop")


def test_the_time_limit_comes_from_the_environment(kept_env: Env) -> None:
    report = cli_json(kept_env | {"PBOTVM_TIMEOUT": "1"}, "exec", "--json", "-lang=sh", "sleep 30")
    assert report["timed_out"] is True


def test_a_port_in_use_is_named(vm_env: Env) -> None:
    with socket.create_server(("127.0.0.1", int(vm_env["PBOTVM_SERIAL"]))):
        for way in ("clone", "restart"):
            assert_refused(cli(vm_env, "start", "--revert", way), 125, vm_env["PBOTVM_SERIAL"], "in use")
        assert cli(vm_env, "exec", "-lang=sh", "true").returncode == 0, "a clone of its own needs no port"
    with socket.create_server(("127.0.0.1", int(vm_env["PBOTVM_PORT"]))):
        assert_refused(cli(vm_env, "run"), 125, vm_env["PBOTVM_PORT"], "in use")


def test_first_environment_is_untouched_by_others() -> None:
    """`environment` is what keeps the tests apart; it must clean up when nothing was ever made in it."""
    for env in environment("never-made"):
        assert json.loads(cli(env, "list", "--json").stdout) == {"machines": []}
