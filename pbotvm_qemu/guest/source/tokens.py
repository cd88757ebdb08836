"""Tokens of C, C++ and Java, found in one pass over the text, whatever it holds.

Every token is consumed by a pattern that never goes back, or by one search for its end, so the time grows with the
length of the text only.
"""

from __future__ import annotations

import re
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Kinds of tokens.
BLANK, NEWLINE, COMMENT, LITERAL, WORD, NUMBER, MARK, ESCAPED = range(8)

_PATTERN = r"""
      (?P<newline>\r?\n)
    | (?P<blank>(?:[ \t\f\v]|\\\r?\n|\r(?!\n))++)
    | (?P<escaped>\\n)
    | (?P<line>//(?:[^\n\\]|\\\r?\n|\\ANY)*+)
    | (?P<block>/\*)
    | (?P<raw>(?:u8|[uUL])?R"(?P<delimiter>[^()\\\s"]{0,16}+)\()
    | (?P<text>\"\"\")
    | (?P<literal>(?:u8|[uUL])?(?:"(?:[^"\\\n]|\\\r?\n|\\.|\\)*+"?|'(?:[^'\\\n]|\\\r?\n|\\.|\\)*+'?))
    | (?P<word>(?:[A-Za-z_$]|[^\x00-\x7f])(?:[A-Za-z0-9_$]|[^\x00-\x7f]|\\\r?\n(?=[A-Za-z0-9_]))*+)
    | (?P<number>\.?[0-9](?:[eEpP][+-]|'(?=[0-9A-Za-z_])|[0-9A-Za-z_.])*+)
    | (?P<mark>%:%:|\.\.\.|<<=|>>=|\?\?[<>()=]|<%|%>|<::(?![:>])|<:|:>|%:|\#\#|[-+*/%&|^=!<>]=|->|\+\+|--|&&|\|\||::|<<|[^\x00-\x1f])
    | (?P<other>.)
    """
_TOKEN = re.compile(_PATTERN.replace("ANY", ""), re.VERBOSE | re.DOTALL)
# In a text of one line, `\n` ends a comment.
_TOKEN_OF_CHAT = re.compile(_PATTERN.replace("ANY", "(?!n)"), re.VERBOSE | re.DOTALL)
_KIND = {"newline": NEWLINE, "blank": BLANK, "line": COMMENT, "literal": LITERAL, "word": WORD, "number": NUMBER,
         "escaped": ESCAPED, "mark": MARK, "other": MARK}  # fmt: skip

# Other spellings of the same: digraphs and trigraphs.
_SAME = {
    "<%": "{",
    "??<": "{",
    "%>": "}",
    "??>": "}",
    "<:": "[",
    "??(": "[",
    ":>": "]",
    "??)": "]",
    "%:": "#",
    "??=": "#",
}
_OPEN = {"(": ")", "[": "]", "{": "}"}
_CLOSE = {")", "]", "}"}


class Tokens:
    """The tokens of `text` that mean something: no blanks, no comments. Directives are set apart.

    Parallel lists instead of objects: a megabyte of punctuation must fit into a small guest.
    """

    def __init__(self, text: str, *, java: bool = False) -> None:
        self.text = text
        self.kind = bytearray()
        self.mark: list[str] = []  # a mark as it is usually spelled; empty for other tokens
        self.start = array("I")
        self.end = array("I")
        self.directives: list[tuple[int, int, int]] = []  # first character, one past the last, number of tokens before
        self.open_comment = -1  # where a comment begins that nothing ends
        self._java = java
        self._read()
        self.match = self._brackets()

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, index: int) -> str:
        """Return token `index` as it is usually spelled; an empty text beyond the end."""
        if not 0 <= index < len(self.mark):
            return ""
        return self.mark[index] or self.text[self.start[index] : self.end[index]]

    def is_word(self, index: int) -> bool:
        """Tell whether token `index` is an identifier or keyword."""
        return 0 <= index < len(self.kind) and self.kind[index] == WORD

    def _read(self) -> None:
        fresh = True  # nothing but blanks since the line began
        directive = -1
        for kind, begin, end in scan(self.text, java=self._java):
            if kind == NEWLINE:
                if directive >= 0:
                    self.directives.append((directive, begin, len(self.kind)))
                    directive = -1
                fresh = True
            elif kind in (BLANK, COMMENT) or directive >= 0:
                if kind == COMMENT and end == len(self.text) and self.text.startswith("/*", begin):
                    closed = end - begin >= len("/**/") and self.text.endswith("*/")
                    self.open_comment = -1 if closed else begin
                if directive >= 0 and self._header_ends(directive, begin, end):
                    self.directives.append((directive, end, len(self.kind)))
                    directive, fresh = -1, True
            elif fresh and not self._java and self.text[begin:end] in ("#", "%:", "??="):
                directive = begin
            else:
                fresh = False
                self.kind.append(kind)
                said = self.text[begin:end] if kind == MARK else ""
                self.mark.append(_SAME.get(said, said))
                self.start.append(begin)
                self.end.append(end)
        if directive >= 0:
            self.directives.append((directive, len(self.text), len(self.kind)))

    def _header_ends(self, directive: int, begin: int, end: int) -> bool:
        """Tell whether the token from `begin` to `end` closes an `#include`, after which code may follow on the line."""
        if self.text[end - 1] not in '>"' or end - directive > _INCLUDE_MAX:
            return False
        said = self.text[directive:end]
        return _INCLUDE.fullmatch(said) is not None

    def _brackets(self) -> array[int]:
        """Return for each bracket the index of its partner, -1 for none; an open brace without one ends with the text."""
        match = array("i", bytes(4 * len(self.kind)))
        stack: list[tuple[str, int]] = []
        waiting = dict.fromkeys(_CLOSE, 0)  # how many in the stack wait for each: whether it is worth a look
        for index, mark in enumerate(self.mark):
            match[index] = -1
            if mark in _OPEN:
                stack.append((mark, index))
                waiting[_OPEN[mark]] += 1
            elif mark in _CLOSE and waiting[mark]:
                # It closes the last one of its kind, whatever was left open in between: text for a macro, or a mistake.
                opened, partner = stack.pop()
                while _OPEN[opened] != mark:
                    waiting[_OPEN[opened]] -= 1
                    opened, partner = stack.pop()
                waiting[mark] -= 1
                match[partner], match[index] = index, partner
        for mark, index in stack:
            if mark == "{":
                match[index] = len(self.kind)
        return match


_INCLUDE_MAX = 300
_INCLUDE = re.compile(r"""(?:\#|%:|\?\?=)[ \t]*+include(?:_next)?[ \t]*+(?:<[^>\n]*+>|"[^"\n]*+")""")


def scan(text: str, *, java: bool = False, pattern: re.Pattern[str] = _TOKEN) -> Iterator[tuple[int, int, int]]:
    """Yield kind, begin and end of every token of `text`, blanks included; together they are the whole text."""
    position = 0
    size = len(text)
    while position < size:
        found = pattern.match(text, position)
        assert found
        name = str(found.lastgroup)
        end = found.end()
        if name in ("block", "raw", "delimiter", "text"):
            kind, end = _long(text, found, java=java)
        else:
            kind = _KIND[name]
        yield kind, position, end
        position = end


def _long(text: str, found: re.Match[str], *, java: bool) -> tuple[int, int]:
    """Return kind and end of a token that ends with a word of its own; without that it takes the rest of the text."""
    begin, end = found.span()
    if found["block"]:
        kind, closing = COMMENT, "*/"
    elif found["text"]:
        if not java:  # an empty literal, and the begin of another one
            return LITERAL, begin + 2
        kind, closing = LITERAL, '"""'
    elif java:
        return WORD, text.index('"', begin)
    else:
        kind, closing = LITERAL, f'){found["delimiter"]}"'
    close = text.find(closing, end)
    return kind, len(text) if close < 0 else close + len(closing)


def expand_newlines(text: str) -> str:
    r"""Return `text` with `\n` outside of literals made line feeds: how people end a line in a chat.

    In a comment only when the text has no line of its own.
    """
    if "\\n" not in text:
        return text
    pattern = _TOKEN if "\n" in text.strip() else _TOKEN_OF_CHAT
    return "".join("\n" if kind == ESCAPED else text[begin:end] for kind, begin, end in scan(text, pattern=pattern))
