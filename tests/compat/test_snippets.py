"""What the preparation makes of a snippet of C behaves as the program that a person would have written around it.

The right column of `snippets.txt` is put by hand into a `main`; nothing here asks the code under test where that begins.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from pbotvm_qemu.guest.source import c
from pbotvm_qemu.languages import Registry

C11 = Registry.load().find("c11")
OPTIONS = ["-std=gnu11", "-trigraphs", "-w", "-O0", "-fno-diagnostics-show-caret"]
PRELUDE = Path(c.__file__).parent
COMPILER = ["gcc", "-isystem", str(PRELUDE), *OPTIONS]
HEADERS = "".join(f"#define {define}\n" for define in C11.defines) + "".join(f"#include <{h}>\n" for h in C11.headers)


def lines_of(name: str) -> list[str]:
    """Return the snippets of the file `name` beside this one."""
    text = Path(__file__).with_name(name).read_text("utf-8").replace("\\\n", "\\\N{SYMBOL FOR NEWLINE}")
    return [line for line in text.splitlines() if line and not re.match(r"# |#$", line)]


LINES = lines_of("snippets.txt")


class Result(NamedTuple):
    """How a program ended; `errors` are a compiler's, without places."""

    errors: list[str]
    status: int | None
    output: str


def parts(line: str) -> tuple[str, str, bool]:
    """Return what stands outside of main, what stands inside, and whether the line is a whole program."""
    line = line.replace("\\\N{SYMBOL FOR NEWLINE}", "\\\n")
    whole = line.startswith("whole ")
    text = line.removeprefix("whole ").replace("\N{PILCROW SIGN}", "\n")
    outside, mark, inside = text.partition("@@")
    return (outside, inside, whole) if mark else ("", text, whole)


def by_hand(line: str, headers: str = HEADERS) -> str:
    outside, inside, whole = parts(line)
    text = outside + inside if whole else ""
    if not whole:
        ended = inside if inside.rstrip().endswith((";", "}", "#endif")) or "unterminated" in inside else f"{inside};"
        text = f"{outside}\nint main(int argc, char *argv[]) {{\n{ended}\n; return 0; }}\n"
    return text if "#include" in outside + inside or "%:include" in text else headers + text


def typed(line: str) -> str:
    outside, inside, _whole = parts(line)
    return (outside + inside).replace("\\\n", "\\\n")


def prepared(text: str) -> str:
    return c.prepare(text, c.Options(cpp=False, file="prog.c", headers=C11.headers, defines=C11.defines)).text


def chatted(text: str) -> str:
    """Return `text` as somebody types it into a chat, where no line ends."""
    return text.replace("\\\n", "\\\0").replace("\n", "\\n").replace("\\\0", "\\\n")


def run(program: str, compiler: list[str] = COMPILER, source: str = "prog.c") -> Result:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / source).write_text(program, "utf-8")
        argv = [*compiler, source, "-lm", "-o", "prog"]
        for more in ([], ["-DPBOTVM_PLAIN"]):  # as the step that compiles does
            built = subprocess.run([*argv, *more], cwd=folder, capture_output=True, text=True, check=False, timeout=60)
            if not built.returncode:
                break
        errors = re.findall(r"error: (.*)", built.stderr)
        if built.returncode:
            return Result(errors[:1], None, "")
        done = subprocess.run(
            ["./prog"], cwd=folder, capture_output=True, text=True, check=False, timeout=20, stdin=subprocess.DEVNULL
        )
        return Result(errors, done.returncode, done.stdout)


def show(line: str) -> str:
    return line[:60].replace("\N{PILCROW SIGN}", " ").replace("\N{SYMBOL FOR NEWLINE}", "")


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[Result, Result, Result]]:
    """For each line the program by hand, the one that was prepared, and the one typed with `\\n` in a chat."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed (scripts/setup --dev installs it)")

    def all_three(line: str) -> tuple[Result, Result, Result]:
        text = typed(line)
        chat = chatted(text)
        first, second = run(by_hand(line)), run(prepared(text))
        return first, second, second if prepared(chat) == prepared(text) else run(prepared(chat))

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(LINES, pool.map(all_three, LINES), strict=True))


def test_there_are_two_hundred() -> None:
    assert len(LINES) >= 200


@pytest.mark.parametrize("line", LINES, ids=show)
def test_snippet_behaves_as_the_program_by_hand(results: dict[str, tuple[Result, Result, Result]], line: str) -> None:
    hand, ours, chat = results[line]
    assert ours == hand
    assert chat == hand
