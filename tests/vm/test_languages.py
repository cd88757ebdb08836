"""Languages in a real guest: every row of the set `core`, and what the C family shows of a program."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu.languages import SETS, Registry
from tests.support import cli, cli_json

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.vm

Env = dict[str, str]
PATIENCE = "120"  # seconds; only a hang takes that long


def c(env: Env, code: str, *options: str) -> dict[str, object]:
    report = cli_json(env, "exec", "--json", "--timeout", PATIENCE, "-lang=c11", *options, code)
    assert isinstance(report, dict)
    return report


def test_every_row_of_the_core_languages_is_green(vm_env: Env) -> None:
    result = cli(vm_env, "languages", "test", "--json", "core")
    reports = json.loads(result.stdout)["languages"]
    bad = {
        (item["language"], row["row"]): row["detail"]
        for item in reports
        for row in item["results"]
        if row["verdict"] == "fail"
    }
    assert not bad
    assert result.returncode == 0, result.stderr
    assert {item["language"] for item in reports} == set(SETS["core"])


def test_a_language_that_the_machine_lacks_is_not_tried(vm_env: Env) -> None:
    result = cli(vm_env, "languages", "test", "haskell")
    assert result.returncode == 2
    assert b"Language 'haskell' is not supported." in result.stderr


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("2 + 2", "no output: 2 + 2 = 4\n"),
        ("int x = 5, y = 16; x ^= y, y ^= x, x ^= y;", "no output: x = 16; y = 5\n"),
        ("int a = 2, b = 3; ++a + b;", "no output: ++a + b = 6; a = 3; b = 3\n"),
        ("sizeof (char)", "no output: sizeof (char) = 1\n"),
        ("int a[] = { 1, 2, 3 }; a", "no output: a = {1, 2, 3}\n"),
        ("'a'", "no output: 'a' = 97\n"),
        ("struct { int x; char *s; } v = { 3, \"text\" };", 'no output: v = {x = 3, s = 0x'),
        ("int a[] = { 1, 2, 3 }; print(a); ptype(a); whatis(a[0]); dump(a[1]+1);",
         "a = {1, 2, 3}\na = int [3]\na[0] = int\na[1]+1 = 3\n"),
        ("print(nosuch);", 'No symbol "nosuch" in current context.\n'),
        ("int n = 0, last = 1; watch(n); while (n < 144) { n += last; last = n - last; } /* fibonacci */",
         "".join(f"n = {n}\n" for n in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144))),
        ('trace(foo); char *foo(int n) { puts("Hello, world"); return "Good-bye, world"; } foo(42);',
         'entered [1] foo (n=42)\nHello, world\nleaving [1] foo (n=42), returned 0x'),
        ("int f(int n) { return n ? f(n - 1) + 1 : 0; } trace(f); f(1);",
         "entered [1] f (n=1)\nentered [2] f (n=0)\nleaving [2] f (n=0), returned 0\nleaving [1] f (n=1), returned 1\n"),
        ('gdb("info line main");', "Line "),
        ('printf("%b %#b %#\'b %08b", 1234567, 5, 1234567, 5);',
         "100101101011010000111 0101 0001.0010.1101.0110.1000.0111 00000101"),
        (r"#define GREETING \"Hello, World\"\n puts(GREETING);".replace('\\"', '"'), "Hello, World\n"),
        ("void print(int n) { printf(\"mine %d\", n); } print(3);", "mine 3"),
    ],
)  # fmt: skip
def test_a_c_program_shows_what_the_documentation_says(vm_env: Env, code: str, printed: str) -> None:
    report = c(vm_env, code)
    assert str(report["stdout"]).startswith(printed), report
    assert report["exit_code"] == 0


def test_a_crash_is_told_with_function_statement_callers_and_variables(vm_env: Env) -> None:
    report = c(vm_env, "void bang(int n) { char *p = 0; p[n] = 1; } int k = 3; bang(k);")
    assert (report["signal"], report["exit_code"]) == (11, 139)
    said = str(report["stderr"]).splitlines()[-1]
    assert said.startswith(
        "Program received signal SIGSEGV, Segmentation fault in bang (n=3) at statement: p[n] = 1; called by main (argc=1, argv=0x"
    )
    assert said.endswith(") at statement: bang(k); <local variables: p = 0x0>")


def test_a_sanitizer_names_the_line_as_the_caller_has_it(vm_env: Env) -> None:
    report = c(vm_env, "char *p = 0; *p = 1;")
    assert str(report["stderr"]).startswith("prog.c:1:17: runtime error: store to null pointer of type 'char'\n")


def test_an_endless_recursion_and_an_abort_are_told(vm_env: Env) -> None:
    deep = c(vm_env, "int f(int n) { return f(n + 1) + 1; } f(0)")
    assert (deep["signal"], "in f (n=" in str(deep["stderr"])) == (11, True)
    failed = c(vm_env, "int x = 1; assert(x == 2);")
    assert failed["signal"] == 6
    assert "prog: prog.c:1: main: Assertion `x == 2' failed." in str(failed["stderr"])
    assert "SIGABRT, Aborted in main (argc=1, " in str(failed["stderr"])


def test_what_prints_something_is_not_looked_at(vm_env: Env) -> None:
    assert c(vm_env, 'int a = 1; puts("hi"); return 3;')["output"] == "hi\n"
    report = c(vm_env, "return 3;")
    assert (report["output"], report["exit_code"]) == ("", 3)


def test_an_error_is_told_where_the_caller_has_it(vm_env: Env, tmp_path: Path) -> None:
    file = tmp_path / "mine.c"
    file.write_text('int f(void) { return 1; }\n\nint a = f();\nputs("x");\n  int b = "text" * 2;\n')
    report = cli_json(vm_env, "exec", "--json", "--timeout", PATIENCE, "-lang=c11", "--file", str(file))
    assert "prog.c:5:18: error: invalid operands" in report["stderr"]
    assert (report["stage"], report["exit_code"]) == ("build", 1)
    one = c(vm_env, "int a = 1; int b = nonsense;")
    assert "prog.c:1:20: error: " in str(one["stderr"])


def test_flags_of_the_preparation(vm_env: Env) -> None:
    assert "undefined reference to `main'" in str(c(vm_env, "-nomain int x;")["stderr"])
    assert "implicit declaration" in str(c(vm_env, '-noheaders puts("x");')["stderr"])
    assert c(vm_env, "-include sys/utsname.h struct utsname u; return uname(&u);")["exit_code"] == 0
    assert c(vm_env, '-O2 -include stdio.h -std=gnu17 puts("x");')["stdout"] == "x\n"


def test_a_sanitizer_reports_by_itself(vm_env: Env) -> None:
    report = c(vm_env, "-fsanitize=address -g int *p = malloc(4); free(p); return *p;")
    assert "heap-use-after-free" in str(report["stderr"])


def test_the_build_has_time_of_its_own(vm_env: Env) -> None:
    report = cli_json(vm_env, "exec", "--json", "--timeout", "1", "-lang=c11", "for (;;) { }")
    assert (report["timed_out"], report["stage"], report["limit"]) == (True, "run", "wall")
    assert report["build_s"] > 0


def test_many_snippets_in_one_guest(vm_env: Env) -> None:
    """The comparison of tests/compat, for a handful, with the compiler of the guest."""
    from tests.compat import test_snippets

    lines = [line for number, line in enumerate(test_snippets.LINES) if number % 40 == 3]
    for line in lines:
        hand = c(vm_env, f"-std=gnu11 -w -lm {test_snippets.by_hand(line)}")
        ours = c(vm_env, f"-std=gnu11 -w -lm {test_snippets.typed(line)}")
        assert (hand["exit_code"], hand["stdout"]) == (ours["exit_code"], ours["stdout"]), line


def test_the_first_run_of_each_language_reads_nothing_from_the_disk(kept_env: Env) -> None:
    """What a first run needs is in the template's memory: `create` has run it. Only translated code is not."""
    session = cli(kept_env, "session", "open").stdout.decode().strip()

    def counts() -> dict[str, int]:
        said = cli(kept_env, "exec", "--session", session, "-lang=sh", "cat /proc/vmstat").stdout.decode()
        return {name: int(value) for name, value in map(str.split, said.splitlines())}

    try:
        counts()
        before = counts()
        for name in SETS["core"]:
            code = Registry.load().find(name).sample_code
            ran = cli_json(
                kept_env, "exec", "--json", "--session", session, "--timeout", PATIENCE, f"-lang={name}", code
            )
            assert ran["output"] == "hello world\n"
        after = counts()
    finally:
        cli(kept_env, "session", "end", session)
    assert after["pgfault"] > before["pgfault"] + 10_000, "the counters count"
    read = after["pgpgin"] - before["pgpgin"]
    assert read < 256, f"{read} KiB: the programs themselves have many times that"
    assert after["pgmajfault"] - before["pgmajfault"] < 8


@pytest.mark.parametrize("piece", ["{", "a(b)c;", "/*"])
def test_a_quarter_of_a_megabyte_of_nonsense_ends_with_an_answer(vm_env: Env, tmp_path: Path, piece: str) -> None:
    file = tmp_path / "nonsense.c"
    file.write_text(piece * (250_000 // len(piece)))
    report = cli_json(vm_env, "exec", "--json", "--timeout", "60", "-lang=c11", "--file", str(file))
    assert report["stage"] == "build" or report["exit_code"] == 0
    assert not report["message"]


def test_a_chat_gets_one_line(kept_env: Env) -> None:
    def ask(code: str) -> str:
        return cli(kept_env, "client", json.dumps({"lang": "c11", "code": code})).stdout.decode()

    assert ask("2 + 2").endswith("no output: 2 + 2 = 4\n")
    assert ask("int x = nonsense;") == "error: 'nonsense' undeclared (first use in this function)\n"
    assert ask(r"// a comment \n puts(\"hi\");".replace('\\"', '"')) == "hi\n"
