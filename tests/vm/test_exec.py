"""`exec` on a real machine: what goes in, what comes out, and that nothing stays."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu.languages import SETS, Registry
from tests.support import cli, cli_json, popen

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.vm

Env = dict[str, str]


def test_words_are_the_program_and_nothing_else_is_printed(vm_env: Env) -> None:
    result = cli(vm_env, "exec", "-lang=sh", "echo", "hello", "world")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"hello world\n", b"")


@pytest.mark.parametrize("language", SETS["core"])
def test_every_core_language_prints_hello_world(vm_env: Env, language: str) -> None:
    sample = Registry.load().find(language).sample_code
    result = cli(vm_env, "exec", f"-lang={language}", sample)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"hello world\n", b"")


def test_the_status_of_the_program_is_ours(vm_env: Env) -> None:
    assert cli(vm_env, "exec", "-lang=sh", "exit 7").returncode == 7


def test_a_signal_is_told_from_a_status(vm_env: Env) -> None:
    report = cli_json(vm_env, "exec", "--json", "-lang=sh", "kill -9 $$")
    assert (report["exit_code"], report["signal"], report["timed_out"]) == (137, 9, False)
    plain = cli_json(vm_env, "exec", "--json", "-lang=sh", "exit 137")
    assert (plain["exit_code"], plain["signal"]) == (137, None)


def test_a_program_over_its_time_is_ended_and_the_next_one_runs(vm_env: Env) -> None:
    result = cli(vm_env, "exec", "--timeout", "2", "-lang=sh", "echo before; sleep 60")
    assert (result.returncode, result.stdout) == (124, b"before\n")
    assert b"--timeout" in result.stderr
    report = cli_json(vm_env, "exec", "--json", "--timeout", "1", "-lang=sh", "sleep 60")
    assert (report["timed_out"], report["limit"], report["exit_code"]) == (True, "wall", 124)
    assert cli(vm_env, "exec", "-lang=sh", "echo next").stdout == b"next\n"


def test_a_compiler_error_ends_the_run_before_the_program(vm_env: Env) -> None:
    report = cli_json(vm_env, "exec", "--json", "-lang=c11", "int main(void) { return nonsense; }")
    assert report["stage"] == "build"
    assert report["exit_code"] == 1
    assert "nonsense" in report["stderr"]
    assert report["stdout"] == ""


def test_arguments_options_and_input_reach_the_program(vm_env: Env) -> None:
    code = "import sys; print(sys.argv[1:], sys.stdin.read().split(), sys.flags.optimize)"
    report = cli_json(vm_env, "exec", "--json", "-lang=python3", "-args=\"a b\" c'd'", "-stdin=x\\ny", f"-O {code}")
    assert report["stdout"] == "['a b', 'cd'] ['x', 'y'] 1\n"


def test_both_streams_keep_the_order_of_writing(vm_env: Env) -> None:
    code = "for i in 1 2 3 4 5 6 7 8 9; do echo out$i; echo err$i >&2; done"
    report = cli_json(vm_env, "exec", "--json", "-lang=sh", code)
    assert report["output"] == "".join(f"out{i}\nerr{i}\n" for i in range(1, 10))


def test_the_streams_can_be_opened_by_their_names(vm_env: Env) -> None:
    result = cli(
        vm_env, "exec", "-lang=sh", "cat /dev/stdin; echo out >/dev/stdout; echo err >/dev/stderr", data=b"in\n"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"in\nout\n", b"err\n")


def test_output_comes_while_the_program_runs(vm_env: Env) -> None:
    """The program waits for an answer to what it printed; were output kept back, this would end by the time limit."""
    child = popen(vm_env, "exec", "--timeout", "60", "-lang=sh", "echo question; read answer; echo got $answer")
    assert child.stdin
    assert child.stdout
    assert child.stdout.readline() == b"question\n"
    child.stdin.write(b"42\n")
    child.stdin.flush()
    assert child.stdout.readline() == b"got 42\n"
    assert child.wait(60) == 0
    for stream in (child.stdin, child.stdout, child.stderr):
        assert stream
        stream.close()


def test_ten_megabytes_pass_through_unchanged(vm_env: Env) -> None:
    data = random.Random(7).randbytes(10 << 20)
    result = cli(vm_env, "exec", "--timeout", "120", "-lang=sh", "cat", data=data)
    assert result.returncode == 0, result.stderr
    assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()


def test_files_go_in_and_out(vm_env: Env, tmp_path: Path) -> None:
    source = tmp_path / "in.bin"
    source.write_bytes(bytes(range(256)) * 1000)
    target = tmp_path / "out.bin"
    result = cli(
        vm_env, "exec", "--put", str(source), "--get", f"copy:{target}", "--get", "nothing", "-lang=sh", "cat in.bin > copy"
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert target.read_bytes() == source.read_bytes()
    assert b"nothing was not fetched" in result.stderr


def test_two_hundred_megabytes_are_cut_at_the_limit(vm_env: Env) -> None:
    report = cli_json(
        vm_env, "exec", "--json", "--timeout", "120", "--output-limit", "1M", "-lang=sh", "head -c 200000000 /dev/zero"
    )
    assert report["truncated"] is True
    assert report["limit"] == "output"
    assert len(report["output"]) == 1 << 20


SPOILERS = {
    "files": "echo x > /tmp/mark; echo x > /home/vm/*/mark; echo x > ~/mark; echo x > /dev/shm/mark; sleep 1000 &",
    "a full disk": "while head -c 100000000 /dev/zero > ~/$((i=i+1)) && head -c 1000 /dev/zero >> /tmp/fill; do :; done",
    "a fork bomb": "f() { f | f & f; }; f; while :; do :; done",
    "all memory": "python3 -c 'a = []\nwhile True: a.append(b\"x\" * 10**7)'",
}


@pytest.mark.parametrize("what", SPOILERS)
def test_whatever_a_run_does_the_next_one_starts_clean(vm_env: Env, what: str) -> None:
    first = cli(vm_env, "exec", "--timeout", "5", "-lang=sh", SPOILERS[what])
    assert first.returncode != 125, first.stderr
    look = "ls -A /tmp /var/tmp /dev/shm /home/vm; ls ~; ps -e | grep -c sleep"
    after = cli(vm_env, "exec", "-lang=sh", look)
    again = cli(vm_env, "exec", "-lang=sh", look)
    assert b"mark" not in after.stdout
    assert b"fill" not in after.stdout
    assert after.stdout == again.stdout


def test_memory_and_process_limits_are_named(vm_env: Env) -> None:
    eater = "a = []\nwhile True: a.append(b'x' * 10**7)"
    assert cli_json(vm_env, "exec", "--json", "--timeout", "60", "-lang=python3", eater)["limit"] == "memory"
    forker = "import os\nwhile True:\n    if not os.fork():\n        import time; time.sleep(100)"
    assert cli_json(vm_env, "exec", "--json", "--timeout", "60", "-lang=python3", forker)["limit"] == "processes"


def test_every_run_has_the_right_time_and_its_own_random_numbers(vm_env: Env) -> None:
    seen = set()
    for _ in range(3):
        before = time.time()
        result = cli(vm_env, "exec", "-lang=sh", "date +%s.%N; head -c 16 /dev/urandom | od -An -tx1")
        stamp, _newline, noise = result.stdout.decode().partition("\n")
        assert before - 1 < float(stamp) < time.time() + 1
        seen.add(noise)
    assert len(seen) == 3


def test_a_program_has_no_rights_and_no_network(vm_env: Env) -> None:
    code = (
        "id -u; ls /sys/class/net; find / -xdev -type f -perm /6000 2>/dev/null | wc -l; cat /etc/shadow /dev/vda /proc/1/environ; "
        "unshare -U true; echo $? > /dev/null"
    )
    report = cli_json(vm_env, "exec", "--json", "-lang=sh", code)
    assert report["stdout"] == "1000\nlo\n0\n"
    assert report["stderr"].count("Permission denied") + report["stderr"].count("No such file") >= 3


def test_runs_at_once_wait_for_each_other_and_are_not_mixed(vm_env: Env) -> None:
    children = [popen(vm_env, "exec", "-lang=sh", f"echo answer {number}") for number in range(4)]
    for number, child in enumerate(children):
        out, err = child.communicate(timeout=120)
        assert (child.returncode, out) == (0, f"answer {number}\n".encode()), err


def test_the_report_holds_every_field(vm_env: Env) -> None:
    report = cli_json(vm_env, "exec", "--json", "-lang=sh", "echo hi; printf '\\377' >&2")
    assert report["stdout"] == "hi\n"
    assert report["stderr_base64"] == "/w=="
    assert set(
        json.loads('["language","stdout","stderr","output","exit_code","signal","timed_out","truncated"]')
    ) <= set(report)
    assert report["transport"] == "virtio-serial"
    assert report["revert"] == "clone"
    assert report["wall_s"] > 0


def test_no_file_of_a_run_is_left_on_the_host(vm_env: Env) -> None:
    cli(vm_env, "exec", "-lang=sh", "true")
    assert cli(vm_env, "prune").stdout == b"nothing was left behind\n"
    left = {name for _folder, _folders, names in os.walk(vm_env["XDG_RUNTIME_DIR"]) for name in names}
    assert left <= {"test-vm.lock", "test-vm.keeper.lock", "test-vm.change.lock"}


def test_an_emulated_guest_has_no_instruction_that_its_kernel_dies_of(vm_env: Env) -> None:
    """QEMU before 8.0 leaves junk in the flags after cmpxchg16b, see docs/architecture.md; Linux uses it where it is."""
    if cli_json(vm_env, "status", "--json")["accelerator"] != "tcg":
        pytest.skip("KVM leaves the processor as it is")
    flags = cli(vm_env, "exec", "-lang=sh", "grep -m 1 ^flags /proc/cpuinfo").stdout.decode().split()
    assert {"cx8", "ssse3", "sse4_2", "popcnt"} < set(flags)
    assert "cx16" not in flags
