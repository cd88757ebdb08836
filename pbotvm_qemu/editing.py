"""Interactive editing for a chat: show, change and run again what was run last in a channel and language.

```text
edit     = "show" [buffer] | "diff" [buffer]
         | ["copy" buffer] {["and"] "undo"} {["and"] change} [["and"] ("run" | "again" | "paste")]
change   = "s/" regex "/" text "/" [flags g i]
         | "replace" [which] 'from' "with" 'to'
         | "remove"  [which] 'text'
         | "append" 'text' | "prepend" 'text'
which    = all | first | second | ... | tenth | last
```

What follows this to its end is an edit; anything else is code, also when it begins with such a word. Regular
expressions are RE2's, whose time grows with the text only; still everything is counted, steps and seconds too.
Histories are bounded, and locked only while they are read or written: a slow edit holds up nobody else.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import re2  # type: ignore[import-untyped]

from pbotvm_qemu import paths
from pbotvm_qemu.errors import HostError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ENTRIES_MAX = 1000  # of one buffer
ENTRY_MAX = 1 << 15  # characters of one entry; longer code is not kept
FILE_MAX = 1 << 20  # bytes of one buffer
BUFFERS_MAX = 2000  # the one that was not changed for longest goes first
TOTAL_MAX = 64 << 20  # bytes of all buffers
SECONDS_MAX = 2.0  # that the changes of one edit may take
STEPS_MAX = 50  # of one edit
_LOCK = 2.0  # seconds until a history must be free
_TRIES = 20  # of a change that others overtake
_EDIT_MAX = 1 << 15  # characters of an edit
_WORDS_MAX = 1000  # that are compared
_REGEX_MAX = 500
_MEMORY_MAX = 1 << 20  # bytes that one regular expression may take

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "nineth", "tenth")
_WHICH = {"all": None, "last": -1, "ninth": 8, **{word: number for number, word in enumerate(_ORDINALS)}}
_WORD = re.compile(r"\s*+(\S++)")
_OPTIONS = re.compile(r"\s*+(?:-\S++\s++)*+")
_BUFFER = re.compile(r"[^\s/\x00]{1,100}")


@dataclass(frozen=True, slots=True)
class Reply:
    """What comes of an edit or of code: text to be shown, or code to be run."""

    text: str | None = None
    code: str | None = None
    paste: bool = False


@dataclass(frozen=True, slots=True)
class _Step:
    verb: str  # show, diff, copy, undo, s, replace, remove, append, prepend, run, paste
    text: str = ""
    to: str = ""
    which: int | None = 0  # None: all of them
    flags: str = ""


class Editor:
    """Keeps what was run in `folder`, one file for each channel and language."""

    def __init__(self, folder: Path, *, usage: str) -> None:
        self._folder = folder
        self._usage = usage

    def handle(self, channel: str, language: str, code: str) -> Reply:
        """Return what to do with `code` that somebody sent in `channel`: run it, or show a text.

        Code that is run is kept. Raises HostError when the history cannot be read or written. Errors of the edit are
        texts.
        """
        try:
            steps = parse(code)
            if steps is None:
                self.keep(channel, language, code)
                return Reply(code=code)
            for _ in range(_TRIES):
                path = self._path(channel, language)
                buffer = self._read(path)
                before = buffer.entries.copy()
                reply = self._edit(steps, buffer, language)
                if buffer.entries == before or self._replace(path, before, buffer):
                    return reply
            return Reply(text="The code is changed by others all the time; try again.")
        except UsageError as exc:
            return Reply(text=f"{exc}  {self._usage}" if exc.hint is None else str(exc))

    def keep(self, channel: str, language: str, code: str) -> None:
        """Keep code that is run. Raises HostError when the history cannot be read or written."""
        path = self._path(channel, language)
        with self._locked():
            buffer = _Buffer(path)
            if buffer.push(code):
                buffer.save()
                self._prune()

    def _read(self, path: Path) -> _Buffer:
        with self._locked():
            return _Buffer(path)

    def _replace(self, path: Path, before: list[str], buffer: _Buffer) -> bool:
        """Write a changed buffer; False when somebody else has changed it meanwhile."""
        with self._locked():
            if _Buffer(path).entries != before:
                return False
            buffer.save()
            self._prune()
            return True

    def _edit(self, steps: list[_Step], buffer: _Buffer, language: str) -> Reply:
        """Carry out `steps` on `buffer`, which is not written here."""
        verbs = [step.verb for step in steps]
        if verbs[0] in ("show", "diff"):
            other = self._read(self._path(steps[0].text, language)) if steps[0].text else buffer
            return Reply(text=_diff(other) if verbs[0] == "diff" else other.newest("No recent code to show."))
        if verbs[0] == "copy":
            code = self._read(self._path(steps[0].text, language)).newest(f"No history for {steps[0].text}.")
        else:
            for _ in range(verbs.count("undo")):
                buffer.undo()
            code = buffer.newest(_nothing(verbs))
        changes = [step for step in steps if step.verb in _CHANGES]
        code = _apply(changes, code)
        if changes or verbs[0] == "copy":
            buffer.push(code)
        if not changes and not {"run", "paste"} & set(verbs):  # undo or copy alone
            return Reply(text=code)
        return Reply(code=code, paste="paste" in verbs)

    def _path(self, channel: str, language: str) -> Path:
        name = quote(f"{channel.lower()}-{language}", safe="#+&!@[]{}")
        if len(name) > 200 or name.startswith("."):
            name = hashlib.sha256(name.encode()).hexdigest()
        return self._folder / f"{name}.hist"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder while the body reads or writes."""
        try:
            paths.private(self._folder)
            with (self._folder / "lock").open("w") as lock:
                until = time.monotonic() + _LOCK
                while True:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if time.monotonic() > until:
                            raise
                        time.sleep(0.005)
                yield
        except OSError as exc:
            raise HostError(
                f"cannot keep a history in {self._folder}: {exc.strerror}", hint="check its owner and free space"
            ) from exc

    def _prune(self) -> None:
        """Forget the buffers that were not changed for longest when there are too many, or they are too large."""
        with os.scandir(self._folder) as entries:
            files = [(entry.stat(), Path(entry.path)) for entry in entries if entry.name.endswith(".hist")]
        total = sum(stat.st_size for stat, _path in files)
        if len(files) <= BUFFERS_MAX and total <= TOTAL_MAX:
            return
        files.sort(key=lambda file: file[0].st_mtime_ns)
        count = len(files)
        for stat, path in files[:-1]:
            if count <= BUFFERS_MAX and total <= TOTAL_MAX:
                return
            path.unlink()
            count -= 1
            total -= stat.st_size


class _Buffer:
    """The entries of one file, the newest first: a JSON object each, or bare text as old installations have it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: list[str] = []
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            lines = file.read(FILE_MAX + 1).decode("utf-8", "replace").split("\n")
            if file.tell() > FILE_MAX:  # of an old installation, which kept more: the last line is not whole
                del lines[-1]
            self.entries = [_entry(line) for line in lines[:ENTRIES_MAX] if line]

    def newest(self, otherwise: str) -> str:
        """Return the newest entry. Raises UsageError with the text `otherwise` when there is none."""
        if not self.entries:
            raise UsageError(otherwise, hint="run something first")
        return self.entries[0]

    def two(self) -> tuple[str, str] | None:
        """Return the entry before the newest one, and the newest one."""
        return (self.entries[1], self.entries[0]) if len(self.entries) > 1 else None

    def undo(self) -> None:
        """Drop the newest entry. Raises UsageError when none would be left."""
        if len(self.entries) < 2:
            raise UsageError("No more undos remaining.", hint="run something first")
        del self.entries[0]

    def push(self, code: str) -> bool:
        """Put `code` in front, unless it stands there already or is too long; tell whether that was done."""
        if len(code) > ENTRY_MAX or self.entries[:1] == [code]:
            return False
        self.entries.insert(0, code)
        return True

    def save(self) -> None:
        """Write the entries, as many of the newest as may be kept."""
        data = bytearray()
        for entry in self.entries[:ENTRIES_MAX]:
            line = json.dumps({"code": entry}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
            if len(data) + len(line) > FILE_MAX:
                break
            data += line
        temporary = self._path.with_suffix(".new")
        try:
            temporary.write_bytes(data)
            temporary.replace(self._path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _entry(line: str) -> str:
    with contextlib.suppress(ValueError, RecursionError):
        decoded = json.loads(line)
        if isinstance(decoded, dict) and isinstance(decoded.get("code"), str):
            return str(decoded["code"])
    return line


def _nothing(verbs: list[str]) -> str:
    """Return what the predecessor says when there is no code for the first of `verbs`."""
    verb = next((verb for verb in verbs if verb != "undo"), "show")
    doing = {
        "run": "to run",
        "paste": "to run",
        "append": "to append to",
        "prepend": "to prepend to",
        "show": "to show",
    }
    return f"No recent code {doing.get(verb, 'to change')}."


# Reading an edit -----------------------------------------------------------------------------------------------------

_CHANGES = ("s", "replace", "remove", "append", "prepend")


def parse(text: str) -> list[_Step] | None:
    """Return the steps of an edit, or None when `text` is code. Raises UsageError for an edit that is broken."""
    if len(text) > _EDIT_MAX:
        return None
    return _Parser(text).edit()


def is_edit(text: str) -> bool:
    """Tell whether `text` is an edit, a broken one too, and no code."""
    try:
        return parse(text) is not None
    except UsageError:
        return True


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text.rstrip()
        self._at = self._skip(_OPTIONS, 0)
        self._steps: list[_Step] = []
        self._sure = False  # a change was read: what is wrong now is a mistake, and no code

    def _skip(self, pattern: re.Pattern[str], at: int) -> int:
        found = pattern.match(self._text, at)
        return found.end() if found else at

    def _word(self) -> str:
        found = _WORD.match(self._text, self._at)
        return found[1] if found else ""

    def _take(self) -> str:
        found = _WORD.match(self._text, self._at)
        if not found:
            return ""
        self._at = found.end()
        return found[1]

    @property
    def _ended(self) -> bool:
        return not self._text[self._at :].strip()

    def edit(self) -> list[_Step] | None:
        """Return all steps."""
        word = self._word()
        if word in ("show", "diff"):
            self._take()
            buffer = self._take()
            fits = self._ended and (not buffer or _BUFFER.fullmatch(buffer))
            return [_Step(word, buffer)] if fits else None
        if word == "copy":
            self._take()
            buffer = self._take()
            if not _BUFFER.fullmatch(buffer):
                return None
            self._steps.append(_Step("copy", buffer))
        while not self._ended:
            if not self._step():
                return None
            if len(self._steps) > STEPS_MAX:
                if not self._sure:
                    return None
                raise UsageError(f"The edit has more than {STEPS_MAX} steps.", hint="make it in two")
        return self._steps or None

    def _step(self) -> bool:
        """Read one step; tell whether there was one."""
        joined = bool(self._steps) and self._word() == "and"
        if joined:
            self._take()
            if self._steps[-1].verb in _CHANGES and self._text[self._at :].lstrip()[:1] == "'":
                return self._change(self._steps[-1].verb)
        word = self._word()
        changed = any(step.verb in _CHANGES for step in self._steps)
        if word == "undo" and not changed:
            self._take()
            self._steps.append(_Step("undo"))
            return True
        if word in ("run", "again", "paste"):
            self._take()
            self._steps.append(_Step("paste" if word == "paste" else "run"))
            return self._ended
        begin = self._skip(re.compile(r"\s*+"), self._at)
        if self._text.startswith("s/", begin):
            self._at = begin + 2
            return self._substitution()
        if word in _CHANGES and word != "s":
            self._take()
            return self._change(word)
        if self._sure:
            raise UsageError(f"Unknown edit {word[:40]!r}.")
        return False

    def _substitution(self) -> bool:
        parts = []
        for _ in range(2):
            part = self._until("/")
            if part is None:
                raise UsageError("Unbalanced slashes.")
            parts.append(part)
        found = re.compile(r"\w*+").match(self._text, self._at)
        flags = found[0] if found else ""
        self._at += len(flags)
        if bad := next((flag for flag in flags if flag not in "gi"), ""):
            raise UsageError(f"Bad regex modifier '{bad}'.  Only 'i' and 'g' are allowed.", hint="use g and i")
        following = self._text[self._at : self._at + 1]
        if following and not following.isspace():
            return False
        self._sure = True
        self._steps.append(_Step("s", parts[0], parts[1], flags=flags))
        return True

    def _until(self, end: str) -> str | None:
        """Return the text up to the next `end` that no backslash is in front of, and go behind it."""
        at, kept = self._at, []
        while at < len(self._text):
            character = self._text[at]
            if character == "\\" and self._text[at + 1 : at + 2] == end:
                kept.append(end)
                at += 2
            elif character == "\\":
                kept.append(self._text[at : at + 2])
                at += 2
            elif character == end:
                self._at = at + 1
                return "".join(kept)
            else:
                kept.append(character)
                at += 1
        return None

    def _change(self, verb: str) -> bool:
        which: int | None = 0
        word = self._word()
        if verb in ("replace", "remove") and not word.startswith("'"):
            if word not in _WHICH:
                if not self._sure and "'" not in self._text:
                    return False  # code that begins with this word
                valid = ", ".join(f"'{name}'" for name in ("all", *_ORDINALS, "last"))
                raise UsageError(
                    f"Bad replacement modifier '{word[:40]}'; valid modifiers are {valid}", hint="name one"
                )
            which = _WHICH[self._take()]
        if not self._text[self._at :].lstrip().startswith("'"):
            return False
        self._sure = True
        text = self._quoted()
        to = ""
        if verb == "replace":
            if self._take() != "with":
                raise UsageError("Bad replacement: write replace 'from' with 'to'.")
            to = self._quoted()
        self._steps.append(_Step(verb, text, to, which))
        return True

    def _quoted(self) -> str:
        self._at = self._skip(re.compile(r"\s*+"), self._at)
        if self._text[self._at : self._at + 1] != "'":
            raise UsageError("Unbalanced single quotes.")
        self._at += 1
        text = self._until("'")
        if text is None:
            raise UsageError("Unbalanced single quotes.")
        return text


# Changing ------------------------------------------------------------------------------------------------------------


def _apply(changes: list[_Step], code: str) -> str:
    """Return `code` with all changes; replacements together, so that one does not find what another wrote."""
    until = time.monotonic() + SECONDS_MAX
    literal = [step for step in changes if step.verb in ("replace", "remove")]
    changed = _replace(literal, code, until) if literal else code
    for step in changes:
        if step.verb == "append":
            changed = f"{changed} {step.text}"
        elif step.verb == "prepend":
            changed = f"{step.text} {changed}"
        elif step.verb == "s":
            changed = _substitute(step, changed, until)
        _fits(len(changed))
    return changed


def _fits(size: int) -> None:
    if size > ENTRY_MAX:
        raise UsageError(f"The code would be longer than {ENTRY_MAX} characters.", hint="make it shorter")


def _in_time(until: float) -> None:
    if time.monotonic() > until:
        raise UsageError("The edit takes too long.", hint="make it simpler")


def _replace(steps: list[_Step], code: str, until: float) -> str:
    spans: list[tuple[int, int, str]] = []
    for step in steps:
        places = list(_places(step.text, code, until))
        if step.which is not None:
            places = places[step.which :][:1]
        spans += [(begin, begin + len(step.text), step.to) for begin in places]
    pieces: list[str] = []
    at = size = 0
    for begin, end, to in sorted(spans):
        if begin >= at:
            pieces += [code[at:begin], to]
            at = end
            size += len(to)
            _fits(size)
    if not pieces:
        raise UsageError("No replacements made.", hint="look at the code with `show`")
    return "".join([*pieces, code[at:]])


def _places(text: str, code: str, until: float) -> Iterator[int]:
    """Yield where `text` stands in `code`, as whole words where it begins or ends with a letter."""
    at = code.find(text) if text else -1
    while at >= 0:
        _in_time(until)
        end = at + len(text)
        before = at and _is_letter(text[0]) and _is_letter(code[at - 1])
        after = end < len(code) and _is_letter(text[-1]) and _is_letter(code[end])
        if not before and not after:
            yield at
            at = code.find(text, end)
        else:
            at = code.find(text, at + 1)


def _is_letter(character: str) -> bool:
    return character.isalnum() or character == "_"


def _substitute(step: _Step, code: str, until: float) -> str:
    _in_time(until)
    if len(step.text) > _REGEX_MAX:
        raise UsageError(f"The expression is longer than {_REGEX_MAX} characters.", hint="make it shorter")
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MEMORY_MAX
    options.case_sensitive = "i" not in step.flags
    try:
        pattern = re2.compile(step.text, options)
    except re2.error as exc:
        said = exc.args[0].decode("utf-8", "replace") if exc.args and isinstance(exc.args[0], bytes) else str(exc)
        raise UsageError(f"Bad regular expression: {said[:200]}", hint="the syntax is RE2's") from exc
    pieces: list[str] = []
    at = size = 0
    for found in pattern.finditer(code):
        _in_time(until)
        piece = _fill(step.to, found.group, code, found.start(), found.end())
        pieces += [code[at : found.start()], piece]
        at = found.end()
        size += len(piece)
        _fits(size)
        if "g" not in step.flags:
            break
    if not pieces:
        raise UsageError("No substitutions made.", hint="look at the code with `show`")
    return "".join([*pieces, code[at:]])


def _fill(text: str, group: Callable[[int], str | None], code: str, begin: int, end: int) -> str:
    """Return the replacement with `$1` to `$9`, `$&`, `` $` `` and `$'` filled in."""
    size = 0

    def value(found: re.Match[str]) -> str:
        nonlocal size
        name = found[1]
        filled = ""
        if name == "`":
            filled = code[:begin]
        elif name == "'":
            filled = code[end:]
        else:
            with contextlib.suppress(IndexError, re2.error):
                filled = group(0 if name == "&" else int(name)) or ""
        size += len(filled)
        _fits(size)
        return filled

    return re.sub(r"\$([1-9&`'])", value, text)


def _diff(buffer: _Buffer) -> str:
    """Return the newest entry with what changed from the one before it, word by word."""
    pair = buffer.two()
    if pair is None:
        return "Not enough recent code to diff."
    before, after = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in pair)
    if before == after:
        return "No difference."
    if max(len(before), len(after)) > _WORDS_MAX:
        return "The code is too long to diff."
    pieces: list[str] = []
    for verb, low, high, first, last in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        old, new = "".join(before[low:high]), "".join(after[first:last])
        pieces.append(
            {
                "equal": new,
                "replace": f"`replaced {old} with {new}`",
                "delete": f"`removed {old}`",
                "insert": f"`inserted {new}`",
            }[verb]
        )
    return "".join(pieces)
