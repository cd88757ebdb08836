"""Which lines of the readers a corpus reaches: Python's own tracing, on functions of the modules that a target is for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pbotvm_qemu
from tests.fuzz.targets import TARGETS

PACKAGE = Path(pbotvm_qemu.__file__).parent
MODULES = {
    "decoder": ("guest/wire",), "hello": ("guest/wire",), "channel": ("channel", "guest/wire"),
    "results": ("pbot_guest",), "line": ("request", "guest/words"), "frames": ("guest/agent", "guest/port", "guest/spec"),
    "vm-exec": ("guest/legacy", "guest/words"), "heartbeat": ("guest/health",),
}  # fmt: skip


def count(name: str, corpus: Path) -> dict[str, tuple[int, int]]:
    """Return for each module of target `name` how many lines inside its functions ran, and how many there are."""
    files = {str(PACKAGE / f"{module}.py"): module for module in MODULES[name]}
    seen: dict[str, set[int]] = {file: set() for file in files}

    def local(frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line":
            seen[frame.f_code.co_filename].add(frame.f_lineno)
        return local

    def trace(frame: FrameType, _event: str, _argument: Any) -> Any:
        return local if frame.f_code.co_filename in seen else None

    inputs = [file.read_bytes() for file in sorted(corpus.iterdir())]
    sys.settrace(trace)
    try:
        for data in inputs:
            TARGETS[name].feed(data)
    finally:
        sys.settrace(None)
    report = {}
    for file, module in files.items():
        there = _lines(compile(Path(file).read_text(), file, "exec"), inside=False)
        report[module] = (len(seen[file] & there), len(there))
    return report


def _lines(code: CodeType, *, inside: bool) -> set[int]:
    """Return the lines of all functions in `code`, which are what a call can reach."""
    found = set()
    if inside:
        found = {line for _start, _end, line in code.co_lines() if line and line != code.co_firstlineno}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _lines(constant, inside=bool(constant.co_flags & 2))  # CO_NEWLOCALS: no class body
    return found
