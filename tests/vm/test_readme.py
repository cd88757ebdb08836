"""The README tells the truth: its `sh` blocks are run in order on a real machine.

A `sh` block must end with 0 at every line; a `text` block directly after it is what it must print on stdout.
"""

from __future__ import annotations

import re
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import LONG

README = Path(__file__).parents[2] / "README.md"
_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Commands of the README, the line where they stand, and what they must print (None: anything)."""

    line: int
    commands: str
    expected: str | None


def blocks(text: str) -> list[Block]:
    """Return the `sh` blocks of `text` in order, each with the `text` block that follows it with only a blank between."""
    fences = [*_FENCE.finditer(text), None]
    found = []
    for fence, following in pairwise(fences):
        if fence is None or fence["info"].strip() != "sh":
            continue
        expected = None
        if following and following["info"].strip() == "text" and not text[fence.end() : following.start()].strip():
            expected = following["body"]
        found.append(Block(text.count("\n", 0, fence.start()) + 2, fence["body"], expected))
    return found


def test_blocks_are_found_with_their_output() -> None:
    text = "a\n\n```sh\necho 1\n```\n\n```text\n1\n```\n\n```sh\ntrue\n```\n\nwords\n\n```text\nno\n```\n```console\n$ x\n```\n"
    assert blocks(text) == [Block(4, "echo 1\n", "1\n"), Block(12, "true\n", None)]


def test_no_block_of_the_readme_sets_up_the_host() -> None:
    commands = "".join(block.commands for block in blocks(README.read_text("utf-8")))
    assert "pbotvm-qemu exec" in commands
    assert "scripts/" not in commands


@pytest.mark.vm
def test_the_commands_of_the_readme_do_what_it_says(vm_env: dict[str, str], tmp_path: Path) -> None:
    try:
        for block in blocks(README.read_text("utf-8")):
            done = subprocess.run(
                ["sh", "-eu", "-c", block.commands],
                env=vm_env,
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=LONG,
                check=False,
            )
            where = f"README.md line {block.line}:\n{block.commands}{done.stderr}"
            assert done.returncode == 0, f"{where}status {done.returncode}"
            if block.expected is not None:
                assert done.stdout == block.expected, where
    finally:  # a block that fails half-way may leave the machine running, which the other tests share
        subprocess.run(
            ["pbotvm-qemu", "stop"],
            env=vm_env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=LONG,
            check=False,
        )
