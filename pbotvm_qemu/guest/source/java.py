"""Makes a complete Java program of what somebody typed: imports, a class, `main`."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from .tokens import Tokens, expand_newlines

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZE_MAX = 1 << 20
_CLASS = "prog"
_TYPES = frozenset({"class", "interface", "enum", "record"})
_MODIFIERS = frozenset(
    "public private protected static final abstract sealed strictfp synchronized native default".split()
)
_CONTROL = frozenset("if for while switch do else return try catch finally synchronized new throw".split())
_IMPORT, _TYPE, _METHOD, _STATEMENT = range(4)


class Prepared(NamedTuple):
    """A complete program, and what is known about it."""

    text: str
    source: str  # what the caller's text is called
    file: str  # what the compiler wants it to be called
    main: str  # the class to be run
    offset: int  # lines of ours before the caller's first one


def prepare(text: str, source: str, imports: Sequence[str], flags: Sequence[str]) -> Prepared:
    """Return the program that `text` stands for. What makes no sense is left to the compiler."""
    if len(text) > SIZE_MAX:
        return Prepared(text, source, source, _CLASS, 0)
    text = expand_newlines(text)
    tokens = Tokens(text, java=True)
    parts = list(_pieces(tokens))
    bare = "-noheaders" in flags or any(kind == _IMPORT for kind, _first, _last in parts)
    head = "" if bare else "".join(f"import {name}; " for name in imports)
    wrapped = "-nomain" not in flags and any(kind in (_METHOD, _STATEMENT) for kind, _first, _last in parts)
    if not wrapped:
        public, main = _classes(tokens, parts)
        return Prepared(f"{head}\n{text}" if head else text, source, f"{public}.java" if public else source, main,
                        1 if head else 0)  # fmt: skip
    return Prepared(_wrap(tokens, parts, head), source, source, _CLASS, 0)


def _pieces(tokens: Tokens) -> list[tuple[int, int, int]]:
    """Return kind, first and last of everything at the top level."""
    found = []
    first = 0
    while first < len(tokens):
        kind, last = _piece(tokens, first)
        found.append((kind, first, last))
        first = last
    return found


def _piece(tokens: Tokens, first: int) -> tuple[int, int]:
    if tokens[first] in ("import", "package"):
        at = first
        while at < len(tokens) and tokens[at] != ";":
            at += 1
        return _IMPORT, min(at + 1, len(tokens))
    at = _declared(tokens, first)
    if tokens[at] in _TYPES and tokens.is_word(at + 1):
        while at < len(tokens) and tokens[at] not in ("{", ";"):
            at += 1
        return _TYPE, min(max(at, tokens.match[at] if at < len(tokens) else at) + 1, len(tokens))
    control = tokens[at] in _CONTROL
    assigned = method = False
    while at < len(tokens):
        mark = tokens[at]
        if mark == ";":
            return _STATEMENT, at + 1
        assigned = assigned or mark == "="
        close = tokens.match[at]
        if mark in ("(", "[") and close > at:
            named = tokens.is_word(at - 1) and tokens[at - 1] not in _CONTROL and at - 1 > first
            typed = tokens.is_word(at - 2) or tokens[at - 2] in (">", "]")
            following = tokens[close + 1] in ("{", "throws")
            method = method or (mark == "(" and named and typed and following and not control and not assigned)
            at = close + 1
        elif mark == "{":
            last = min(close + 1, len(tokens))
            if method:
                return _METHOD, last
            more = (
                tokens[last] in ("else", "catch", "finally", "while")
                if control
                else assigned or tokens[last] in (";", ".", ")")
            )
            if not more:
                return _STATEMENT, last
            at = last
        else:
            at += 1
    return _STATEMENT, len(tokens)


def _declared(tokens: Tokens, first: int) -> int:
    """Return the token after the modifiers and annotations at `first`."""
    at = first
    while at < len(tokens):
        if tokens[at] in _MODIFIERS:
            at += 1
        elif tokens[at] == "@" and tokens.is_word(at + 1) and tokens[at + 1] != "interface":
            at += 2
            while tokens[at] == "." and tokens.is_word(at + 1):
                at += 2
            if tokens[at] == "(" and tokens.match[at] > at:
                at = tokens.match[at] + 1
        elif tokens[at] == "@" and tokens[at + 1] == "interface":
            return at + 1
        else:
            break
    return at


def _classes(tokens: Tokens, parts: Sequence[tuple[int, int, int]]) -> tuple[str, str]:
    """Return the public class, which names the file, and the one with `main`."""
    public, main, first_class = "", "", ""
    for kind, first, last in parts:
        if kind != _TYPE:
            continue
        name = next((tokens[at + 1] for at in range(first, last) if tokens[at] in _TYPES), "")
        first_class = first_class or name
        if any(tokens[at] == "public" for at in range(first, _declared(tokens, first))):
            public = name
        if not main and any(tokens[at] == "main" and tokens[at + 1] == "(" for at in range(first, last)):
            main = name
    return public, main or first_class or _CLASS


_OF_A_CLASS = frozenset("static public private protected".split())  # no local variable begins with them


class _Writer:
    """Puts each part on the line where the caller has it."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._lines = [match.start() for match in re.finditer("\n", tokens.text)]
        self._out: list[str] = []
        self._line = 1

    def put(self, piece: str, first: int | None = None) -> None:
        """Write `piece`, in the line of token `first` when that lies ahead."""
        if first is not None and first < len(self._tokens):
            wanted = bisect_right(self._lines, self._tokens.start[first]) + 1
            self._out.append("\n" * max(0, wanted - self._line))
            self._line = max(self._line, wanted)
        self._out.append(piece)
        self._line += piece.count("\n")

    def copy(self, first: int, last: int, before: str = "", after: str = " ") -> None:
        """Write tokens `first` to before `last` as they stand."""
        text = self._tokens.text[self._tokens.start[first] : self._tokens.end[last - 1]]
        self.put(f"{before}{text}{after}", first)

    def text(self) -> str:
        """Return everything that was written."""
        return "".join(self._out)


def _wrap(tokens: Tokens, parts: Sequence[tuple[int, int, int]], head: str) -> str:
    """Return a class with everything in it."""
    out = _Writer(tokens)
    has_main = any(
        kind == _METHOD and any(tokens[at] == "main" for at in range(first, min(first + 8, last)))
        for kind, first, last in parts
    )
    out.put(head)
    for kind, first, last in parts:
        if kind == _IMPORT:
            out.copy(first, last)
    out.put(f"public class {_CLASS} {{ ")
    fields = {first for kind, first, _last in parts if kind == _STATEMENT and tokens[first] in _OF_A_CLASS}
    statements = [(first, last) for kind, first, last in parts if kind == _STATEMENT and first not in fields]
    members = [(kind, first, last) for kind, first, last in parts if kind in (_TYPE, _METHOD) or first in fields]
    # Lines stay right as long as they grow: what comes first in the text comes first here.
    statements_first = bool(statements) and (not members or statements[0][0] < members[0][1])
    if not has_main and statements_first:
        _put_main(out, statements, tokens)
    for _kind, first, last in members:
        static = any(tokens[at] == "static" for at in range(first, min(first + 4, last)))
        out.copy(first, last, "" if static else "static ")
    if has_main:
        for first, last in statements:  # fields
            out.copy(first, last, "static ")
    elif not statements_first:
        _put_main(out, statements, tokens)
    out.put("}\n")
    return out.text()


def _put_main(out: _Writer, statements: Sequence[tuple[int, int]], tokens: Tokens) -> None:
    out.put("public static void main(String[] args) throws Exception { ")
    for number, (first, last) in enumerate(statements):
        closed = number + 1 < len(statements) or tokens[last - 1] in (";", "}")
        out.copy(first, last, after=" " if closed else "; ")
    out.put("} ")
