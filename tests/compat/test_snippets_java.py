"""As `test_snippets.py`, for Java: a snippet behaves as the program that a person would have written around it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from pbotvm_qemu.guest.source import java
from tests.compat.test_snippets import chatted, lines_of, show

LINES = lines_of("snippets_java.txt")
MISTAKES = 7  # the last lines of the file
IMPORTS = ("java.util.*",)
HEADERS = "import java.util.*;\n"


class Result(NamedTuple):
    """How a program ended; `errors` are the compiler's, without places."""

    errors: str
    end: str
    output: bytes


class Program(NamedTuple):
    """A complete program."""

    text: str
    file: str
    main: str


def parts(line: str) -> tuple[str, str, str]:
    """Return imports, members with `~` where a person writes `static`, and statements."""
    text = line.replace("\N{PILCROW SIGN}", "\n")
    members, mark, statements = text.rpartition("@@")
    imports = re.match(r"(?:import [^;]+; )*", members if mark else "")
    assert imports
    return imports[0], members[imports.end() :], statements


def by_hand(line: str) -> Program:
    if line.startswith("whole "):
        text = typed(line)
        public = re.search(r"public class (\w+)", text)
        named = public or re.search(r"(?:class|record|enum|interface) (\w+)", text)
        assert named
        return Program(
            text if "import" in text else HEADERS + text, f"{public[1] if public else 'prog'}.java", named[1]
        )
    imports, members, statements = parts(line)
    ended = statements if statements.rstrip().endswith((";", "}")) or "//" in statements else f"{statements};"
    text = (
        f"{imports or HEADERS}\npublic class prog {{\n{members.replace('~', 'static ')}\n"
        f"public static void main(String[] args) throws Exception {{\n{ended}\n}}\n}}\n"
    )
    return Program(text, "prog.java", "prog")


def typed(line: str) -> str:
    if line.startswith("whole "):
        return line.removeprefix("whole ").replace("\N{PILCROW SIGN}", "\n")
    imports, members, statements = parts(line)
    return imports + members.replace("~", "") + statements


def prepared(text: str) -> Program:
    made = java.prepare(text, "prog.java", IMPORTS, ())
    return Program(made.text, made.file, made.main)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Result, Result, Result]]:
    """For each line the program by hand, the one that was prepared, and the one typed with `\\n` in a chat."""
    if not shutil.which("javac"):
        pytest.skip("javac is not installed (Debian has it in default-jdk-headless)")
    base = tmp_path_factory.mktemp("programs")
    wanted = {line: (by_hand(line), prepared(typed(line)), prepared(chatted(typed(line)))) for line in LINES}
    folders = {
        program: base / str(number) for number, program in enumerate({p for three in wanted.values() for p in three})
    }
    for program, folder in folders.items():
        folder.mkdir()
        (folder / program.file).write_text(program.text, "utf-8")
        (folder / "source").write_text(program.file)
        (folder / "main").write_text(program.main)
    harness = Path(__file__).with_name("Compile.java")
    done = subprocess.run(
        ["java", "-XX:TieredStopAtLevel=1", "-ea", harness, *folders.values()],
        capture_output=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    known = {
        program: Result((folder / "errors").read_text(), (folder / "end").read_text(), (folder / "output").read_bytes())
        for program, folder in folders.items()
    }
    return {line: (known[hand], known[ours], known[chat]) for line, (hand, ours, chat) in wanted.items()}


def test_there_are_fifty() -> None:
    assert len(LINES) >= 50


@pytest.mark.parametrize("line", LINES, ids=show)
def test_snippet_behaves_as_the_program_by_hand(results: dict[str, tuple[Result, Result, Result]], line: str) -> None:
    hand, ours, chat = results[line]
    assert ours == hand
    if '"""' not in line:  # what stands in a literal is the program's own
        assert chat == hand


def test_only_the_mistakes_do_not_compile(results: dict[str, tuple[Result, Result, Result]]) -> None:
    assert [line for line, (hand, _ours, _chat) in results.items() if hand.errors] == LINES[-MISTAKES:]
