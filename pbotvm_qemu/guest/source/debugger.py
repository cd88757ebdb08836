"""What runs inside of gdb, in its own Python: the report on a core file, and the commands that a program gives.

Imported by gdb only; `build.py` starts it. Everything is bounded: values, frames, the whole report.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
from typing import TYPE_CHECKING, Any

import gdb  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Iterator

_TEXT_MAX = 2000  # characters of one report
_VALUE_MAX = 300  # of one value
_FRAMES_MAX = 64  # that are looked at
_SHOWN_MAX = 6  # calls that are named
_HOOKS = ("pbotvm_leaves_main", "pbotvm_end_of_main", "pbotvm_last", "pbotvm_last_place")
_SETTINGS = (
    "confirm off", "pagination off", "width 0", "height 0", "style enabled off", "print null-stop on",
    "print elements 200", "print repeats 10", "print inferior-events off", "print thread-events off",
    "startup-with-shell off", "breakpoint pending off", "max-value-size 1048576", "print max-depth 8",
)  # fmt: skip


class Facts:
    """What `build.py` wrote down: which statement stands where."""

    def __init__(self) -> None:
        self.source = ""
        self.statements: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError, KeyError), open(".pbotvm.json", encoding="utf-8") as file:
            table = json.load(file)
            self.source, self.statements = table["source"], table["statements"]


def prepare() -> Facts:
    """Set gdb up: quiet, and without questions."""
    for setting in _SETTINGS:
        with contextlib.suppress(gdb.error):
            gdb.execute(f"set {setting}", to_string=True)
    return Facts()


def say(text: str, stream: int = 1) -> None:
    """Write a line where the program's own output goes."""
    data = (text[:_TEXT_MAX] + "\n").encode("utf-8", "replace")
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(stream, data) :]


def shown(value: Any) -> str:
    """Return a value as gdb prints it, cut when it is long."""
    try:
        text = str(value.format_string(max_elements=200, repeat_threshold=10, symbols=False))
    except (gdb.error, RuntimeError, UnicodeError):
        return "?"
    text = " ".join(text.split())
    return text if len(text) <= _VALUE_MAX else text[:_VALUE_MAX] + "..."


# The report on a core file -------------------------------------------------------------------------------------------


def report(program: str, core: str) -> None:
    """Say why `program` ended, or what its variables were when it ended without a word, from the core file it left."""
    facts = prepare()
    gdb.execute(f"file {program}", to_string=True)
    gdb.execute(f"core-file {core}", to_string=True)
    frames = list(_frames())
    for number, frame in enumerate(frames):
        if frame.name() in _HOOKS and number + 1 < len(frames):
            if text := _silent(frame, frames[number + 1]):
                say(f"no output: {text}")
            return
    number = int(gdb.parse_and_eval("$_siginfo.si_signo"))
    say(crash(number, frames, facts), stream=2)


def _frames() -> Iterator[Any]:
    frame = gdb.newest_frame()
    for _ in range(_FRAMES_MAX):
        if frame is None:
            return
        yield frame
        try:
            frame = frame.older()
        except gdb.error:  # a stack that was written over
            return


def _silent(hook: Any, main: Any) -> str:
    """Return the value of the last statement and the variables of `main`."""
    parts = []
    with contextlib.suppress(gdb.error, ValueError):
        if hook.name() in ("pbotvm_last", "pbotvm_last_place"):
            statement = hook.read_var("statement").string()
            if value := _last_value(hook, main, statement):
                parts.append(f"{statement} = {value}")
    names = {part.partition(" = ")[0] for part in parts}
    return "; ".join([*parts, *(item for item in variables(main) if item.partition(" = ")[0] not in names)])


def _last_value(hook: Any, main: Any, statement: str) -> str:
    if hook.name() == "pbotvm_last_place":
        main.select()
        return shown(gdb.parse_and_eval(statement))
    if int(hook.read_var("is_void")):
        return ""
    value = main.read_var("pbotvm_value")
    if value.type.code in (gdb.TYPE_CODE_REF, gdb.TYPE_CODE_RVALUE_REF):
        value = value.referenced_value()
    return "" if str(value.type) == "pbotvm_void" else shown(value)


def variables(frame: Any) -> list[str]:
    """Return `name = value` for what is declared in the function of `frame` and in scope."""
    found: dict[str, str] = {}
    try:
        block = frame.block()
    except RuntimeError:
        return []
    while block is not None:
        for symbol in block:
            if symbol.is_variable and not symbol.is_argument and not symbol.name.startswith(("pbotvm_", "__")):
                with contextlib.suppress(gdb.error):
                    value = symbol.value(frame)
                    if not value.is_optimized_out:
                        found.setdefault(symbol.name, shown(value))
        if block.function is not None:
            break
        block = block.superblock
    return [f"{name} = {value}" for name, value in found.items()]


def crash(number: int, frames: list[Any], facts: Facts) -> str:
    """Return one line that says which signal came, where, called from where, and with which variables."""
    own = [frame for frame in frames if _place(frame, facts)]
    try:
        name, meaning = signal.Signals(number).name, signal.strsignal(number) or "unknown"
    except ValueError:
        name, meaning = f"signal {number}", "unknown"
    text = f"Program received signal {name}, {meaning.removesuffix(' (core dumped)')}"
    if not own:
        return text + (f" in {frames[0].name()}" if frames and frames[0].name() else "")
    calls = [call(frame, facts) for frame in own]
    if len(calls) > _SHOWN_MAX:
        calls = [*calls[: _SHOWN_MAX // 2], f"{len(calls) - _SHOWN_MAX}+ more calls", *calls[-_SHOWN_MAX // 2 :]]
    text += " in " + " called by ".join(calls)
    values = "; ".join(variables(own[0]))
    return text + (f" <local variables: {values}>" if values else "")


def call(frame: Any, facts: Facts) -> str:
    """Return `function (arguments) at statement: text` of a frame."""
    given = []
    function = frame.function()
    if function is not None:
        with contextlib.suppress(RuntimeError, gdb.error):
            block = frame.block()
            while block.function is None and block.superblock is not None:
                block = block.superblock
            for symbol in block:
                if symbol.is_argument:
                    with contextlib.suppress(gdb.error):
                        given.append(f"{symbol.name}={shown(symbol.value(frame))}")
    text = f"{frame.name()} ({', '.join(given)})"
    statement = _place(frame, facts)
    return text + (f" at statement: {statement}" if statement and statement != "?" else "")


def _place(frame: Any, facts: Facts) -> str:
    """Return the statement that `frame` is in; "?" when it is the caller's own and not known, "" when it is not."""
    place = frame.find_sal()
    if place.symtab is None:
        return ""
    # Newer debug information puts the run's folder in front, whose name may be a number too.
    folder, _, file = place.symtab.filename.removeprefix(f"{os.getcwd()}/").rpartition("/")
    if file != facts.source:
        return ""
    part = folder.rpartition("/")[2].removeprefix("pbotvm-")
    part = part if part.isdigit() else "0"
    if folder.endswith("pbotvm"):
        return "?"
    for line in range(place.line, max(0, place.line - 20), -1):
        text = facts.statements.get(f"{part}:{line}")
        if text is not None:
            return text or "?"
        part = part if line == place.line and part == "0" else "0"
    return "?"


# Commands that a program gives ---------------------------------------------------------------------------------------


class Gdb(gdb.Breakpoint):  # type: ignore[misc]
    """Stops at the function `gdb` of prelude.h."""

    def __init__(self) -> None:
        super().__init__("gdb", internal=True)
        self.silent = True


class Watch(gdb.Breakpoint):  # type: ignore[misc]
    """Prints a variable whenever it changes."""

    def __init__(self, expression: str, frame: Any) -> None:
        super().__init__(expression, gdb.BP_WATCHPOINT, internal=True)
        self.silent = True
        self._shown = expression
        self._frame = frame

    def stop(self) -> bool:
        """Print the new value, and let the program go on."""
        with contextlib.suppress(gdb.error, RuntimeError):
            if self._frame.is_valid():
                self._frame.select()
            say(f"{self._shown} = {shown(gdb.parse_and_eval(self._shown))}")
        return False


class Trace(gdb.Breakpoint):  # type: ignore[misc]
    """Stops where a function begins."""

    def __init__(self, name: str) -> None:
        super().__init__(name, internal=True)
        self.silent = True


class Leave(gdb.FinishBreakpoint):  # type: ignore[misc]
    """Says what a traced function returns."""

    depth = 0

    def __init__(self, frame: Any, said: str) -> None:
        super().__init__(frame, internal=True)
        self.silent = True
        self._said = said

    def stop(self) -> bool:
        """Print the value, and let the program go on."""
        value = "" if self.return_value is None else f", returned {shown(self.return_value)}"
        say(f"leaving [{Leave.depth}] {self._said}{value}")
        Leave.depth -= 1
        return False

    def out_of_scope(self) -> None:
        """Take back what was counted when the function is left by a jump."""
        Leave.depth = max(0, Leave.depth - 1)


def run() -> None:
    """Run the loaded program to its end, doing what it asks for at each call of `gdb`."""
    facts = prepare()
    with contextlib.suppress(gdb.error):
        gdb.execute("handle all nostop noprint pass", to_string=True)
    ended: list[int] = []
    gdb.events.exited.connect(lambda event: ended.append(getattr(event, "exit_code", -1)))
    try:
        stop = Gdb()
        gdb.execute("run", to_string=True)
        while gdb.selected_inferior().pid:
            frame = gdb.newest_frame()
            name = frame.name()
            if stop.is_valid() and name == "gdb" and frame.older() is not None:
                _obey(frame)
            elif name is not None and any(
                item.location == name for item in gdb.breakpoints() or () if isinstance(item, Trace)
            ):
                _enter(frame, facts)
            gdb.execute("continue", to_string=True)
    except gdb.error as exc:
        if not ended:
            say(f"gdb: {exc}", stream=2)
            os._exit(126)
    _end(ended[-1] if ended else -1)


def _obey(frame: Any) -> None:
    """Do what the program wants."""
    try:
        command, _, expression = frame.read_var("command").string().partition(" ")
        caller = frame.older()
        caller.select()
        if command in ("print", "print_last_statement"):
            say(f"{expression} = {shown(gdb.parse_and_eval(expression))}")
        elif command in ("ptype", "whatis"):
            text = gdb.execute(f"{command} {expression}", to_string=True).removeprefix("type = ").strip()
            say(f"{expression} = {text}")
        elif command == "watch":
            Watch(expression, caller)
        elif command == "break":
            Trace(expression)
        else:
            say(gdb.execute(f"{command} {expression}".strip(), to_string=True).rstrip("\n"))
    except (gdb.error, RuntimeError, UnicodeError) as exc:
        say(str(exc))


def _enter(frame: Any, facts: Facts) -> None:
    said = call(frame, facts).partition(" at statement: ")[0]
    Leave.depth += 1
    say(f"entered [{Leave.depth}] {said}")
    with contextlib.suppress(gdb.error, ValueError):  # main has nobody to return to
        Leave(frame, said)


def _end(status: int) -> None:
    """End as the program did, so that whoever waits for us sees its status or its signal."""
    if status < 0:
        with contextlib.suppress(gdb.error):
            number = int(gdb.parse_and_eval("$_exitsignal"))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
            os.kill(os.getpid(), number)
    os._exit(status if status >= 0 else 126)
