"""Where the command line begins and ends: PBot's spelling, errors, exit status."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NoReturn, TextIO

import typer

from pbotvm_qemu.cli.base import Interrupted, app, print_json
from pbotvm_qemu.errors import USAGE, PbotVMError, UsageError


def pbot_spelling(arguments: list[str]) -> list[str]:
    """Return `arguments` with PBot's single-dash options in `exec` spelled as the parser knows them.

    The first word that is no option of ours begins the program, or the options of its compiler, and whatever follows
    is passed on as it is: `exec -lang=sh -args 'a b' echo -lang=x`. The words after `client` all belong to the request.
    """
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command not in ("exec", "client"):
        return arguments
    begin = arguments.index(command) + 1
    changed, rest = arguments[:begin], arguments[begin:]
    while rest and rest[0] != "--":
        name, equals, _value = rest[0].lstrip("-").partition("=")
        flag = rest[0] in ("-h", "--help") or (command == "exec" and rest[0] in ("--json", "--keep"))
        valued = command == "exec" and rest[0].startswith("-") and name in _WITH_VALUE
        if not flag and not valued:
            break
        word = rest.pop(0)
        changed.append(word if flag or word.startswith("--") else f"-{word}")
        if valued and not equals and rest:
            changed.append(rest.pop(0))
    return [*changed, *([] if not rest or rest[0] == "--" else ["--"]), *rest]


_WITH_VALUE = ("lang", "vm", "args", "arguments", "stdin", "file", "put", "get", "timeout", "output-limit", "session",
               "transport")  # fmt: skip


_COMMANDS = (
    "machines",
    "keepers",
    "programs",
    "states",
    "languages",
    "networks",
    "benches",
)  # in the order of the help
# What typer raises when it does not understand a call; this is the only one of the family that it exports.
_NotUnderstoodError: Any = typer.BadParameter.__mro__[1]


def define(arguments: list[str]) -> None:
    """Define the commands. A call that runs a program needs to know no others, and bots make many of these."""
    for module in ("programs",) if arguments[:1] in (["exec"], ["client"]) else _COMMANDS:
        importlib.import_module(f"pbotvm_qemu.cli.{module}")


def main() -> None:
    """Run the command line and exit."""
    define(sys.argv[1:])
    try:
        sys.exit(app(args=pbot_spelling(sys.argv[1:]), prog_name="pbotvm-qemu", standalone_mode=False))
    except _NotUnderstoodError as exc:
        _refuse(_understandable(exc))
    except PbotVMError as exc:
        _refuse(exc)
    except Interrupted as exc:
        _tell(str(exc))
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone
        _drop(sys.stdout, sys.stderr)
        sys.exit(141)


def _tell(text: str, **style: Any) -> None:
    """Print a line for people. When nobody reads it, the exit status still says how we end."""
    try:
        typer.secho(text, err=True, **style)
    except BrokenPipeError:
        _drop(sys.stderr)


def _drop(*streams: TextIO) -> None:
    """Have nobody get what is still in the buffers of `streams`: Python writes it at its end."""
    with open(os.devnull, "wb", buffering=0) as nowhere:  # noqa: PTH123 - a name for it is in os
        for stream in streams:
            os.dup2(nowhere.fileno(), stream.fileno())


def _understandable(exc: Any) -> UsageError:
    """Return typer's refusal of a call as one of ours. Exits where typer has shown its help instead."""
    text = exc.format_message().rstrip(".")
    if not text:
        sys.exit(USAGE)
    command = exc.ctx.command_path if exc.ctx else "pbotvm-qemu"
    return UsageError(text, hint=f"see {command} --help")


def _refuse(exc: PbotVMError) -> NoReturn:
    if "--json" in sys.argv:
        print_json({"error": str(exc), "hint": exc.hint, "kind": exc.kind, "exit_code": exc.exit_code})
    _tell(f"error: {exc}", fg="red")
    if exc.hint:
        _tell(f"hint: {exc.hint}", dim=True)
    sys.exit(exc.exit_code)
