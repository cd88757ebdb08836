"""The architecture: who may import whom, and who may reach for what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import pbotvm_qemu

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGE = Path(pbotvm_qemu.__file__).parent

# A module imports only from the rows before its own.
ROWS = (
    {"guest", "errors", "turns", "service"},
    {"network.policy", "network.steps"},
    {"network.addresses", "paths", "endpoints", "network.links", "process", "qmp", "channel", "runlog", "languages", "warmth"},
    {"transports", "errands"},
    {"config"},
    {"network.bridgehelper", "network.dhcp", "network.managers", "network.netfilter", "accel", "image", "state", "request", "reply", "watchdog", "pbot_guest", "metrics", "editing", "shelf"},
    {"network.attachment", "network.netprobe", "network.netsetup"},
    {"network.taps"},
    {"net", "network.uplink"},
    {"plan", "execution", "paste"},
    {"template"},
    {"vhost_user"},
    {"machine"},
    {"ways"},
    {"pool"},
    {"sessions", "snapshots", "relay", "ports"},
    {"control"},
    {"pbot"},
    {"frontdoor"},
    {"keeper"},
    {"trial", "bench_transports"},
    {"network_commands"},
    {"commands", "creation", "running"},
    {"installing"},
    {"bench", "bench_net", "doctor", "plot", "api", "top"},
    {"cli"},
    {"__main__"},
)  # fmt: skip
SPLIT = ("network",)  # packages whose modules have rows of their own
# Sideways within a row is not allowed, with these exceptions: the second may be imported by the first.
BESIDE = {("config", "endpoints"), ("accel", "paths"), ("accel", "process")}

HOST = sorted(path for path in PACKAGE.rglob("*.py") if "guest" not in path.relative_to(PACKAGE).parts)
GUEST = sorted((PACKAGE / "guest").glob("*.py"))
SOURCE = sorted((PACKAGE / "guest" / "source").glob("*.py"))
ONLY = {
    "re2": "editing",
    "typer": "cli",
    "rich": "cli",
    "pyroute2": "network.links",
    "qemu": "qmp",
    "psutil": "process",
    "prometheus_client": "metrics",
    "pygal": "plot",
}


def module_of(path: Path) -> str:
    """Return the name by which ROWS knows a file: most packages stand in one row as a whole."""
    return room(path.relative_to(PACKAGE).with_suffix("").parts)


def room(parts: Sequence[str]) -> str:
    return ".".join(parts[:2]) if parts[0] in SPLIT else parts[0]


def imported(path: Path) -> set[str]:
    """Return every module that `path` imports anywhere, dotted, names from our own package included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.ImportFrom) and node.module in {
            "pbotvm_qemu",
            *(f"pbotvm_qemu.{it}" for it in SPLIT),
        }:
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


def ours(path: Path) -> set[str]:
    names = {room(name.split(".")[1:]) for name in imported(path) if name.startswith("pbotvm_qemu.")}
    return names - {"__version__", module_of(path)}


def row(module: str) -> int:
    return next(number for number, modules in enumerate(ROWS) if module in modules)


def test_every_module_has_one_row() -> None:
    there = {module_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__", *(f"{it}.__init__" for it in SPLIT)}
    listed = [module for modules in ROWS for module in modules]
    assert sorted(listed) == sorted(there)


@pytest.mark.parametrize("path", HOST, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    if path in {PACKAGE / "__init__.py", *(PACKAGE / it / "__init__.py" for it in SPLIT)}:
        assert imported(path) == set()
        return
    here = module_of(path)
    wrong = {name for name in ours(path) if row(name) >= row(here) and (here, name) not in BESIDE}
    assert not wrong, f"{here} imports from its own row or above: {wrong}"
    assert not {name for name in imported(path) if name.startswith(".")}, "the host's modules import by full names"


@pytest.mark.parametrize("path", HOST, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_library_has_one_importer(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported(path)}
    foreign = {root for root in roots if root in ONLY and ONLY[root] != module_of(path)}
    assert not foreign
    assert roots <= sys.stdlib_module_names | ONLY.keys() | {"pbotvm_qemu"}


@pytest.mark.parametrize("path", [*GUEST, *SOURCE], ids=lambda path: str(path.relative_to(PACKAGE)))
def test_guest_imports_only_the_standard_library_and_itself(path: Path) -> None:
    siblings = {"", "source", *(file.stem for file in (*GUEST, *SOURCE))}
    names = imported(path)
    assert {name.lstrip(".") for name in names if name.startswith(".")} <= siblings
    foreign = {"gdb"} if path.stem == "debugger" else set()  # which gdb brings
    assert {name.split(".")[0] for name in names if not name.startswith(".")} <= sys.stdlib_module_names | foreign


def test_guest_has_no_cycle() -> None:
    graph = {file.stem: {name.lstrip(".") for name in imported(file) if name.startswith(".")} for file in GUEST}
    names = {
        stem: {
            alias.name
            for node in ast.walk(ast.parse((PACKAGE / "guest" / f"{stem}.py").read_text("utf-8")))
            if isinstance(node, ast.ImportFrom) and node.level and not node.module
            for alias in node.names
        }
        for stem in graph
    }
    todo = {stem: (targets | names[stem]) & graph.keys() - {stem} for stem, targets in graph.items()}
    while todo:
        free = {stem for stem, targets in todo.items() if not targets & todo.keys()}
        assert free, f"these import each other: {sorted(todo)}"
        for stem in free:
            del todo[stem]


@pytest.mark.parametrize("path", [*HOST, *GUEST, *SOURCE], ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_calls_a_shell(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in {"os.system", "os.popen", "asyncio.create_subprocess_shell", "subprocess.getoutput"}
        assert not called.startswith(("pickle.", "marshal."))
        assert called not in {"eval", "exec"}
        assert "shell" not in {keyword.arg for keyword in node.keywords}


@pytest.mark.parametrize("path", HOST, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_prints_and_exits(path: Path) -> None:
    if module_of(path) == "cli":
        return
    called = {
        ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)
    }
    assert not called & {"print", "sys.exit", "exit", "typer.echo"}


@pytest.mark.parametrize("path", HOST, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_subprocesses_go_through_one_door(path: Path) -> None:
    if module_of(path) == "process":
        return
    assert "subprocess" not in imported(path)
    called = {
        ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)
    }
    assert not {
        name for name in called if name.startswith(("os.exec", "os.spawn", "os.fork", "asyncio.create_subprocess"))
    }


def test_a_machine_without_a_tap_does_not_load_pyroute2() -> None:
    """It takes 13 MB and a tenth of a second, in every keeper and every `exec`."""
    code = "import sys, pbotvm_qemu.keeper, pbotvm_qemu.execution; print('pyroute2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
