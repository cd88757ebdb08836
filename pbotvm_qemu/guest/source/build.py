"""Steps of a run that are ours instead of a program's: prepare and compile, run, report. As user vm, in its directory.

The agent forks and calls `main`; so there is no start of another Python, which costs more than the work itself.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import resource
import subprocess
from pathlib import PurePath
from typing import TYPE_CHECKING

from ..spec import OWN
from . import c, java, keep

if TYPE_CHECKING:
    from collections.abc import Sequence

CORE = "core"  # what start sets core_pattern to
FACTS = ".pbotvm.json"

_SAID_MAX = 1000
_SOURCE_MAX = 8 << 20
_OUTPUT_MAX = 1 << 20  # characters of a compiler that are kept
_TWICE = ("gcc", "g++", "clang", "clang++", "cc", "c++")  # compilers that know our options
_GDB = ("gdb", "-nx", "-q", "-batch", "-iex", "set debuginfod enabled off", "-iex", "set auto-load local-gdbinit off")


def main(argv: Sequence[str], environment: dict[str, str]) -> int:
    """Do the step that `argv` names and return its exit status. It may turn into the program instead."""
    os.environ.clear()
    os.environ.update(environment)
    try:
        return _step(argv)
    except Exception as exc:  # whoever waits must learn why nothing came of it
        os.write(2, f"{argv[0]} failed: {type(exc).__name__}: {exc}\n".encode("utf-8", "replace")[:_SAID_MAX])
        return 126


def _step(argv: Sequence[str]) -> int:
    name = argv[0].removeprefix(OWN)
    if name == "build":
        return build(json.loads(argv[1]), argv[2:])
    if name == "run":
        return run(argv[1:])
    if name == "report":
        return report(argv[1])
    if name == "keep":
        return keep.run(argv[1], lambda: _program(argv[2:]))
    os.write(2, f"there is no step {name[:40]!r}\n".encode())
    return 126


def _program(argv: Sequence[str]) -> int:
    """Become the program, or do the step of ours that does. Returns only when it cannot."""
    if argv[0].startswith(OWN):
        return _step(argv)
    try:
        os.execvp(argv[0], list(argv))
    except OSError as exc:
        os.write(2, f"{argv[0]} cannot be started: {exc.strerror}\n".encode())
    return 126


# build ---------------------------------------------------------------------------------------------------------------


def build(wanted: dict[str, object], compiler: Sequence[str]) -> int:
    """Make a complete program of the source and compile it; what the compiler says goes to stderr."""
    source = str(wanted["source"])
    with open(source, encoding="utf-8", errors="surrogateescape") as file:
        text = file.read(_SOURCE_MAX)
    flags = [str(flag) for flag in wanted.get("flags", ())]  # type: ignore[attr-defined]
    chat = wanted.get("chat") is True
    headers = tuple(str(name) for name in wanted.get("headers", ()))  # type: ignore[attr-defined]
    if wanted["kind"] == "java":
        return _build_java(java.prepare(text, source, headers, flags), compiler, chat=chat)
    options = c.Options(
        cpp=wanted["kind"] == "c++",
        file=source,
        headers=() if "-noheaders" in flags else headers,
        defines=() if "-noheaders" in flags else tuple(str(name) for name in wanted.get("defines", ())),  # type: ignore[attr-defined]
        includes=tuple(value for flag, value in itertools.pairwise(flags) if flag == "-include"),
        main="-nomain" not in flags,
        prelude="-noheaders" not in flags,
    )
    return _build_c(c.prepare(text, options), source, compiler, chat=chat)


def _build_c(prepared: c.Prepared, source: str, compiler: Sequence[str], *, chat: bool) -> int:
    with open(f".{source}", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(prepared.text)
    with open(FACTS, "w", encoding="utf-8") as file:
        json.dump({"source": source, "statements": prepared.statements, "debugger": prepared.debugger}, file)
    argv = list(compiler)
    if PurePath(argv[0]).name in _TWICE:  # so that `assert` names the file as the caller knows it
        argv += [f"-fmacro-prefix-map={part}/=" for part in range(1, prepared.parts + 1)]
    status, said = _compile(argv)
    if status and prepared.last:  # perhaps the last statement has no value that could be kept
        status, said = _compile([*argv, "-DPBOTVM_PLAIN"])
    lines = _own_lines(said, source)
    if chat:
        lines = _for_chat(lines, source)
        if prepared.warning:
            lines.insert(0, prepared.warning)
    _tell(lines, bracketed=chat and not status)
    return status


def _build_java(prepared: java.Prepared, compiler: Sequence[str], *, chat: bool) -> int:
    with open(prepared.file, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(prepared.text)
    with open(".main", "w", encoding="utf-8") as file:
        file.write(f"{prepared.main}\n")
    status, said = _compile([prepared.file if word == prepared.source else word for word in compiler])
    place = re.compile(re.escape(prepared.file) + r":(\d+):")
    lines = [
        place.sub(lambda found: f"{prepared.file}:{max(1, int(found[1]) - prepared.offset)}:", line) for line in said
    ]
    _tell(_for_chat(lines, prepared.file) if chat else lines, bracketed=chat and not status)
    return status


def _compile(argv: Sequence[str]) -> tuple[int, list[str]]:
    """Run a compiler; return its status and the lines that it said."""
    try:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as exc:
        return 126, [f"{argv[0]} cannot be started: {exc.strerror}"]
    assert child.stdout
    with child.stdout:
        said = child.stdout.read(_OUTPUT_MAX)
        while child.stdout.read(1 << 16):
            pass
    status = child.wait()
    return status if status >= 0 else 128 - status, said.decode("utf-8", "replace").splitlines()


def _own_lines(lines: Sequence[str], source: str) -> list[str]:
    """Return what a compiler said with places as the caller knows them, without warnings about what is ours."""
    name = re.escape(source)
    ours = re.compile(rf"{c.OURS}(?:-\d+)?/{name}:\d+:(?:\d+:)? (?:warning|note): ")
    place = re.compile(rf"(?<![\w/.-])(?:{c.OURS}(?:-\d+)?|\d+)/{name}")
    kept: list[str] = []
    seen: set[str] = set()
    for line in lines:
        if ours.match(line):
            continue
        changed = place.sub(source, line)
        if changed in seen and f"{source}:" in changed:  # the same complaint about a copy of ours
            continue
        seen.add(changed)
        kept.append(changed)
    return _without_empty_heads(kept, source)


def _without_empty_heads(lines: Sequence[str], source: str) -> list[str]:
    """Drop `In function` and `In file included` lines that nothing follows any more."""
    head = re.compile(rf"{re.escape(source)}: (?:In|At) \S+")
    included = re.compile(r"In file included from |\s+from \S+:\d+")
    kept: list[str] = []
    for line in reversed(lines):
        empty = (not kept or head.match(kept[-1])) if head.match(line) else (not kept and included.match(line))
        if not empty:
            kept.append(line)
    return kept[::-1]


_NOISE = re.compile(
    r"compilation terminated due to -Wfatal-errors\.|\d+ (?:warning|error)s?(?: and \d+ errors?)? generated\.|\d+ (?:warning|error)s?|"
    r"collect2: error: .*|In file included from .*|\s+from \S+:\d+.*|\S+: In function 'main':|\S+: In function 'int main\(.*"
)
_BINARY = re.compile(r"warning: .*'%b'.*")


def _for_chat(lines: Sequence[str], source: str) -> list[str]:
    """Return a compiler's lines short enough for a chat: no places, no noise, plain quotes."""
    place = re.compile(rf"{re.escape(source)}:(?:\d+:)*\s*")
    kept: list[str] = []
    for line in lines:
        plain = line.translate(_QUOTES).replace("\t", "   ")
        if _NOISE.fullmatch(plain):
            continue
        plain = place.sub("", plain)
        plain = _BINARY.sub("note: %b is a candide extension", plain)
        if plain.strip() and plain not in kept[-8:]:
            kept.append(plain)
    return kept


_QUOTES = str.maketrans({"\N{LEFT SINGLE QUOTATION MARK}": "'", "\N{RIGHT SINGLE QUOTATION MARK}": "'", "`": "'"})


def _tell(lines: Sequence[str], *, bracketed: bool) -> None:
    text = "\n".join(lines)
    if not text.strip():
        return
    data = (f"[{' '.join(text.split())}]\n" if bracketed else f"{text}\n").encode("utf-8", "replace")
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]


# run and report ------------------------------------------------------------------------------------------------------


def run(argv: Sequence[str]) -> int:
    """Turn into the program; or into gdb with it, when it gives the debugger commands. Returns only when it cannot."""
    most = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (most, most))
    try:
        if _uses_debugger():
            gdb = _debugger("run")
            os.execvp(gdb[0], [*gdb, "--args", *argv])
        os.execvp(argv[0], list(argv))
    except OSError as exc:
        os.write(2, f"{argv[0]} cannot be started: {exc.strerror}\n".encode())
    return 126


def _uses_debugger() -> bool:
    try:
        with open(FACTS, encoding="utf-8") as file:
            return json.load(file)["debugger"] is True
    except (OSError, ValueError, KeyError):
        return False


def report(program: str) -> int:
    """Have gdb read the core file of a program that crashed, or that ended without a word."""
    gdb = _debugger("report")
    try:
        os.execvp(gdb[0], [*gdb, "-ex", f"python debugger.report({program!r}, {CORE!r})"])
    except OSError as exc:
        os.write(2, f"gdb cannot be started: {exc.strerror}\n".encode())
    return 126


def _debugger(what: str) -> list[str]:
    """Return the command line of gdb with our module loaded, up to what it is to do."""
    package = __package__ or ""
    root = PurePath(__file__).parents[package.count(".") + 1]
    load = f"python import sys; sys.path.insert(0, {str(root)!r}); from {package} import debugger"
    return [*_GDB, "-ex", load, *(["-ex", "python debugger.run()"] if what == "run" else [])]
