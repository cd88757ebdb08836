"""As `test_snippets.py`, for C++: a snippet behaves as the program that a person would have written around it."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu.guest.source import c
from tests.compat.test_snippets import PRELUDE, Result, by_hand, chatted, lines_of, run, show, typed

if TYPE_CHECKING:
    from pathlib import Path

LINES = lines_of("snippets_cpp.txt")
MISTAKES = 7  # the last lines of the file
NAMES = (
    "compare", "concepts", "cstdio", "cstdlib", "functional", "iostream", "map", "memory", "stdexcept", "string", "utility",
    "vector",
)  # fmt: skip
HEADERS = "".join(f"#include <{name}>\n" for name in NAMES)
COMPILER = ["g++", "-isystem", str(PRELUDE), "-std=gnu++20", "-w", "-O0", "-fno-diagnostics-show-caret"]


def prepared(text: str) -> str:
    return c.prepare(text, c.Options(cpp=True, file="prog.cpp", headers=NAMES, defines=())).text


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Result, Result, Result]]:
    """For each line the program by hand, the one that was prepared, and the one typed with `\\n` in a chat."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed (scripts/setup --dev installs it)")
    compiler = [*COMPILER, "-include", str(precompiled(tmp_path_factory.mktemp("headers")))]

    def all_three(line: str) -> tuple[Result, Result, Result]:
        text = typed(line)
        programs = (by_hand(line, HEADERS), prepared(text), prepared(chatted(text)))
        known = {program: run(program, compiler, "prog.cpp") for program in set(programs)}
        hand, ours, chat = (known[program] for program in programs)
        return hand, ours, chat

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(LINES, pool.map(all_three, LINES), strict=True))


def precompiled(folder: Path) -> Path:
    """Return a header with all of ours that is compiled once: the programs say again what they include."""
    header = folder / "all.h"
    header.write_text(HEADERS)
    subprocess.run([*COMPILER, "-x", "c++-header", header, "-o", f"{header}.gch"], check=True, timeout=120)
    return header


def test_a_raw_string_keeps_its_lines() -> None:
    text = 'std::puts(R"(one\n{ \\n)");'
    assert text.removesuffix(";") in prepared(text)


def test_there_are_a_hundred() -> None:
    assert len(LINES) >= 100


@pytest.mark.parametrize("line", LINES, ids=show)
def test_snippet_behaves_as_the_program_by_hand(results: dict[str, tuple[Result, Result, Result]], line: str) -> None:
    hand, ours, chat = results[line]
    assert ours == hand
    assert chat == hand


def test_only_the_mistakes_do_not_compile(results: dict[str, tuple[Result, Result, Result]]) -> None:
    assert [line for line, (hand, _ours, _chat) in results.items() if hand.errors] == LINES[-MISTAKES:]
