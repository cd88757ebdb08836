"""The prepare step in a real guest, with texts that are made to be slow: its time grows as the text does, its memory is bounded.

Three languages of the machine get another meaning here: the prepare step of C, of C++ or of Java, and `true` in place
of the compiler and of the program. What is measured is the way of the text to the step, and the step.
`PBOTVM_TEST_SHAPES` (such as 99) tries that many shapes of text with each of them instead of one: under emulation all
of them take half an hour.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support import cli

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.vm

Env = dict[str, str]
AS = {"c": "c11", "c++": "bc", "java": "lua"}  # which language of the machine stands for what
SHAPES = {
    "c": ["<%", "{", "/*", '"', "(", "a(b)c;", "f(){}", "{;\n", "??<", "#if\n", "'", "// \\\n"],
    "c++": ['R"(', "<%", "{", "/*", "(", "a(b)c;", "f(){}", "template<", "{;\n", "operator", "a<", '"'],
    "java": ['"', "{", '"""', "/*", "(", "a(b)c;", "f(){}", "class A{", "int a,", "{;\n", "@", "'"],
}
TRIED = int(os.environ.get("PBOTVM_TEST_SHAPES", "1"))
CASES = [(kind, shape) for kind, shapes in SHAPES.items() for shape in shapes[:TRIED]]
SMALL, LARGE = 1 << 18, (1 << 20) - 1  # characters; a line feed is added, and more is not prepared
SQUARE = (LARGE / SMALL) ** 2
NOISE = 0.5  # seconds by which two equal runs may differ
MEMORY = 256 << 20  # bytes; a guest of 512 MiB lets a run have 416


class Cost(NamedTuple):
    """What a run took: seconds of the processor time of all processes on the host, bytes of memory in the guest."""

    seconds: float
    memory: int


@pytest.fixture(scope="module")
def prepare_env(vm_env: Env, tmp_path_factory: pytest.TempPathFactory) -> Env:
    """The environment of the machine, with language files that end with the prepare step."""
    home = tmp_path_factory.mktemp("config")
    folder = home / "pbotvm-qemu" / "languages"
    folder.mkdir(parents=True)
    for kind, name in AS.items():
        like = {"c": "c11", "c++": "c++", "java": "java"}[kind]
        (folder / f"{name}.toml").write_text(
            f'like = "{like}"\naliases = []\nbuild = ["true"]\nrun = ["true"]\n[limits]\nbuild = 1200\n'
        )
    return vm_env | {"XDG_CONFIG_HOME": str(home)}


def prepare(env: Env, kind: str, text: str, file: Path) -> Cost:
    file.write_text(text)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = cli(env, "exec", "--json", "--timeout", "120", f"-lang={AS[kind]}", "--file", str(file), timeout=1800)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads(result.stdout)
    assert (report["exit_code"], report["stage"], report["output"]) == (0, "run", ""), report
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(seconds, report["memory_peak"])


@pytest.fixture(scope="module")
def nothing(prepare_env: Env, tmp_path_factory: pytest.TempPathFactory) -> Cost:
    """What a run costs by itself."""
    file = tmp_path_factory.mktemp("empty") / "text"
    return prepare(prepare_env, "c", "int x;", file)


@pytest.mark.parametrize(("kind", "shape"), CASES, ids=repr)
def test_a_megabyte_takes_as_much_longer_as_it_is_larger(
    prepare_env: Env, nothing: Cost, tmp_path: Path, kind: str, shape: str
) -> None:
    small, large = (
        prepare(prepare_env, kind, "".join(itertools.islice(itertools.cycle(shape), size)), tmp_path / "text")
        for size in (SMALL, LARGE)
    )
    ratio = (large.seconds - nothing.seconds) / max(small.seconds - nothing.seconds, NOISE)
    said = f"{kind} {shape!r}: {small} {large}, {ratio:.1f} times, without {nothing}"
    sys.stdout.write(f"{said}\n")
    assert ratio < SQUARE / 2, said
    assert large.memory < MEMORY, said
