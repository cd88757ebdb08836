"""Makes a complete C or C++ program of what somebody typed: headers, `main`, and what the debugger needs to know.

Statements that stand outside of functions go into a new `main`. `#line` gives everything its place in the caller's
text; of several statements on one line the second says that it stands in `1/prog.c`, the third in `2/prog.c`, so that
a debugger can tell them apart. What is of our own making says that it stands in `pbotvm/prog.c`.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from . import outline
from .outline import BLOCK, DECLARATION, DECLARING, FUNCTION, STATEMENT, TYPE, Piece
from .tokens import NUMBER, Tokens, expand_newlines

if TYPE_CHECKING:
    from collections.abc import Sequence

OURS = "pbotvm"  # the folder of lines of our own making
SIZE_MAX = 1 << 20  # characters; a longer text is compiled as it stands
COMMANDS = ("dump", "print", "ptype", "whatis", "trace", "watch")  # of prelude.h; `gdb` is a function

_INCLUDES_MAX = 64  # that a caller can ask for in his text
_PARTS_MAX = 100  # statements of one line that are told apart
_BREAKS_MAX = 2000  # of one program
_COLUMNS_MAX = 500  # up to which columns stay right
_STATEMENT_MAX = 200  # characters that are kept of a statement, to be shown
_CONDITIONAL = re.compile(r"\s*(?:if|ifdef|ifndef)\b")
_END = re.compile(r"\s*endif\b")
_EMPTY = re.compile(r"(?:;\s*+)++\Z")
_INCLUDE = re.compile(r"\s*include")
# Words that say something by themselves, or have no value worth showing.
_LOUD = re.compile(
    r".*scanf|fgets|memset|.*printf|.*puts|while|for|do|if|switch|ptype|dump|print|trace|watch|gdb|assert|main|return|exec.*|"
    r"exit|_exit|abort|throw|delete|co_.*|break|continue|goto|else|try|catch|asm|__asm__|cout|cerr|clog|raise|signal"
)
_KNOWN_TYPES = frozenset(
    {"FILE", "va_list", "string", "vector", "div_t", "ldiv_t", "lldiv_t", "jmp_buf", "time_t", "complex"}
)


class Options(NamedTuple):
    """What the language and the caller want."""

    cpp: bool
    file: str  # what the caller's text is called
    headers: tuple[str, ...]  # for a text without any `#include`
    defines: tuple[str, ...]  # likewise
    includes: tuple[str, ...] = ()  # the caller's own -include
    main: bool = True
    prelude: bool = True


class Prepared(NamedTuple):
    """A complete program, and what is known about it."""

    text: str
    statements: dict[str, str]  # "PART:LINE" -> the statement that begins there
    parts: int  # lines were cut into at most that many parts
    debugger: bool  # it gives the debugger commands
    last: bool  # a value may be shown; compiled with -DPBOTVM_PLAIN it is not
    warning: str


def prepare(text: str, options: Options) -> Prepared:
    """Return the program that `text` stands for. Never fails: what makes no sense is left to the compiler."""
    if len(text) > SIZE_MAX:
        return Prepared(text, {}, 0, debugger=False, last=False, warning="")
    text, options = _take_flags(expand_newlines(text), options)
    return _Writer(Tokens(text), options).program()


def _take_flags(text: str, options: Options) -> tuple[str, Options]:
    """Take `-nomain`, `-noheaders` and `-include NAME` out of the text: they count wherever they stand."""
    if "-nomain" not in text and "-noheaders" not in text and "-include" not in text:
        return text, options
    tokens = Tokens(text)
    pieces, kept = [], 0
    for index in range(len(tokens) - 1):
        begin, end = tokens.start[index], tokens.end[index + 1]
        name = tokens[index + 1]
        if tokens[index] != "-" or begin < kept or name not in ("nomain", "noheaders", "include"):
            continue
        if name == "include" and len(options.includes) >= _INCLUDES_MAX:
            continue
        alone = (not begin or text[begin - 1].isspace()) and (end == len(text) or text[end].isspace())
        if not alone or tokens.start[index + 1] != begin + 1:
            continue
        if name == "include":
            value = _HEADER.match(text, end)
            if not value:
                continue
            end = value.end()
            options = options._replace(includes=(*options.includes, value[1].strip('<>"')))
        else:
            options = (
                options._replace(main=False)
                if name == "nomain"
                else options._replace(prelude=False, headers=(), defines=())
            )
        pieces += [text[kept:begin], " " * (end - begin)]
        kept = end
    return "".join([*pieces, text[kept:]]), options


_HEADER = re.compile(r'\s++(<[^>\s]{1,200}>|"[^"\s]{1,200}"|[\w./+-]{1,200})(?=\s|$)')


class _Writer:
    """Writes the program, keeping track of which line of the caller's text is where."""

    def __init__(self, tokens: Tokens, options: Options) -> None:
        self._tokens = tokens
        self._text = tokens.text
        self._options = options
        self._out: list[str] = []
        self._lines = [0, *(match.end() for match in re.finditer("\n", tokens.text))]
        self._part = 0
        self._line = 0  # where the last statement began
        self._breaks = 0
        self._used_parts = 0
        self._statements: dict[str, str] = {}
        self._debugger = False
        self._last = False

    def program(self) -> Prepared:
        """Return the whole program."""
        tokens, options = self._tokens, self._options
        pieces = outline.pieces(tokens, cpp=options.cpp)
        has_main = any(piece.kind == FUNCTION and piece.name == "main" for piece in pieces)
        inside = set() if has_main or not options.main else self._inside(pieces)
        directives = self._split_directives(pieces, inside)
        self._head(directives)
        self._file_scope(pieces, inside, directives)
        if not has_main and options.main:
            self._main([piece for piece in pieces if piece.first in inside], directives)
        if tokens.open_comment >= 0:  # the compiler shall say so
            self._out.append("\n" + self._text[tokens.open_comment :])
        return Prepared(
            "".join(self._out) + "\n", self._statements, self._used_parts, self._debugger, self._last, self._warning()
        )

    # What goes where -------------------------------------------------------------------------------------------------

    def _inside(self, pieces: Sequence[Piece]) -> set[int]:
        """Return the first tokens of the pieces that belong into `main`: statements, and what follows the functions."""
        tokens, cpp = self._tokens, self._options.cpp
        functions = [number for number, piece in enumerate(pieces) if piece.kind == FUNCTION]
        behind = functions[-1] + 1 if functions else 0
        inside: set[int] = set()
        began = False
        for number, piece in enumerate(pieces):
            opening = number >= behind and not began
            if opening and tokens[piece.first] in (";", "}"):  # what closes the function
                continue
            if piece.kind in (FUNCTION, BLOCK) or (cpp and opening and self._is_type(piece)):
                continue
            if number >= behind or piece.kind == STATEMENT:
                inside.add(piece.first)
                began = began or number >= behind
        return inside

    def _is_type(self, piece: Piece) -> bool:
        return piece.kind == TYPE or self._tokens[piece.first] in ("using", "typedef", "extern")

    def _split_directives(self, pieces: Sequence[Piece], inside: set[int]) -> list[tuple[int, int, int, bool]]:
        """Return the directives between pieces with whether each goes into `main`."""
        tokens = self._tokens
        starts = {piece.first for piece in pieces} | {len(tokens)}
        first = min(inside, default=len(tokens) + 1)
        outside = max((piece.first for piece in pieces if piece.first not in inside), default=-1)
        depth, open_at = 0, -1
        found: list[tuple[int, int, int, bool]] = []
        for begin, end, before in tokens.directives:
            if before not in starts:
                continue
            said = self._text[begin + 1 : min(end, begin + 40)].replace("%:", "").replace("?=", "")
            if _CONDITIONAL.match(said):
                open_at = len(found) if not depth else open_at
                depth += 1
            found.append((begin, end, before, before > max(first, outside) and not _INCLUDE.match(said)))
            if _END.match(said) and depth:
                depth -= 1
            if depth and before == first > outside:
                # A condition that is still open where main begins belongs to what stands in main.
                found[open_at:] = [(*item[:3], not _INCLUDE.match(self._text, item[0] + 1)) for item in found[open_at:]]
        return found

    # The parts of a program ------------------------------------------------------------------------------------------

    def _head(self, directives: Sequence[tuple[int, int, int, bool]]) -> None:
        """Write what comes before the caller's first line. His own `#include` takes the place of all ours."""
        options = self._options
        self._out.append(f'#line 1 "{OURS}/{options.file}"\n')
        self._out += [f"#include <{name}>\n" for name in options.includes]
        own = any(_INCLUDE.match(self._text, begin + 1) for begin, _end, _before, _main in directives)
        if not own:
            self._out += [f"#define {define}\n" for define in options.defines]
            self._out += [f"#include <{name}>\n" for name in options.headers]
        self._put(f'#line 1 "{options.file}"\n', part=0, line=0)

    def _prelude(self) -> None:
        """Write the include of our own header, and take away those of its names that the program uses itself."""
        if not self._options.prelude:
            return
        self._out.append(f'\n#line 1 "{OURS}/{self._options.file}"\n#include <prelude.h>\n')
        tokens = self._tokens
        own: set[str] = set()
        used: set[str] = set()
        for index in range(len(tokens)):
            word = tokens[index] if tokens.is_word(index) else ""
            if word == "gdb":
                self._debugger = True
            elif word in COMMANDS:
                begins = not index or tokens[index - 1] in (";", "{", "}", ")", ":", "else", "do")
                (used if begins and tokens[index + 1] == "(" else own).add(word)
        self._debugger = self._debugger or bool(used - own)
        self._out += [f"#undef {word}\n" for word in sorted(own)]

    def _file_scope(
        self, pieces: Sequence[Piece], inside: set[int], directives: Sequence[tuple[int, int, int, bool]]
    ) -> None:
        """Write directives and pieces that stay outside of functions, in the caller's order."""
        waiting = [item for item in directives if not item[3]]
        prelude_at = self._prelude_place(waiting)
        number = 0
        for piece in [*pieces, None]:
            before = piece.first if piece else len(self._tokens)
            while number < len(waiting) and waiting[number][2] <= before:
                if number == prelude_at:
                    self._prelude()
                self._directive(waiting[number])
                number += 1
            if number >= prelude_at >= 0:
                self._prelude()
                prelude_at = -1
            if piece and piece.first not in inside:
                self._piece(piece)

    def _prelude_place(self, directives: Sequence[tuple[int, int, int, bool]]) -> int:
        """Return before which of the directives our header goes: behind the first ones, outside of any condition."""
        depth, place = 0, 0
        for number, (begin, _end, before, _main) in enumerate(directives):
            if before:
                break
            depth += bool(_CONDITIONAL.match(self._text, begin + 1)) - bool(_END.match(self._text, begin + 1))
            if depth <= 0:
                place = number + 1
        return place

    def _main(self, pieces: Sequence[Piece], directives: Sequence[tuple[int, int, int, bool]]) -> None:
        """Write a `main` around the pieces."""
        tokens, options = self._tokens, self._options
        waiting = [item for item in directives if item[3]]
        self._out.append(f'\n#line 1 "{OURS}/{options.file}"\nint main(int argc, char *argv[]) {{')
        self._hook()
        first, last = (pieces[0].first, pieces[-1].last) if pieces else (0, 0)
        if pieces and len(pieces) == 1 and tokens[first] == "{" and tokens.match[first] == last - 1:
            first, last = first + 1, last - 1  # braces around everything
            pieces = [Piece(STATEMENT, first, last)] if first < last else []
        final = self._final(pieces)
        number = 0
        for piece in pieces:
            while number < len(waiting) and waiting[number][2] <= piece.first:
                self._directive(waiting[number])
                number += 1
            if piece.first < (final[0] if final else len(tokens) + 1):
                self._statements_of(piece.first, min(piece.last, final[0] if final else piece.last))
        if final:
            self._final_statement(*final)
        for item in waiting[number:]:
            self._directive(item)
        self._out.append(f'\n#line 1 "{OURS}/{options.file}"\n;')
        if options.cpp and options.prelude:
            self._out.append(" pbotvm_end_of_main();")
        self._out.append(" return 0; }")

    def _hook(self) -> None:
        """Have the end of `main` noticed, however it is reached."""
        if self._options.prelude and not self._options.cpp:
            self._out.append(" PBOTVM_MAIN ")

    def _piece(self, piece: Piece) -> None:
        if piece.kind != FUNCTION:
            self._place(piece.first)
            self._copy(piece.first, piece.last)
            return
        self._place(piece.first)
        self._statements.setdefault(f"{self._part}:{self._line}", "")  # where a function begins is no statement
        self._copy(piece.first, piece.body + 1)
        body = piece.body + 1
        if piece.name == "main":
            self._hook()
            self._place(body, always=True)
            if self._options.cpp and self._options.prelude:
                self._end_of_main(body, piece.last)
            else:
                self._body_of_main(body, piece.last)
            return
        self._statements_of(body, piece.last)

    def _body_of_main(self, first: int, last: int) -> None:
        """Write tokens of a `main` that is there already; PBot's host marks the statement whose value is wanted."""
        tokens = self._tokens
        for at in range(first, last - 2):
            close = tokens.match[at + 1] if tokens[at + 1] == "(" else -1
            marked = tokens[at] == "print_last_statement" and tokens[at - 1] in (";", "{", "}")
            if not marked or not at + 2 < close < last - 1 or tokens[close + 1] != ";":
                continue
            self._statements_of(first, at)
            if self._options.prelude and not self._debugger and not self._last and self._has_value(at + 2, close):
                self._final_statement(at + 2, close)
            else:
                self._statements_of(at + 2, close)
            first = close + 1
            break
        self._statements_of(first, last)

    def _end_of_main(self, body: int, last: int) -> None:
        """Write the body of a C++ `main`; values are shown before the last `return`, where objects still live."""
        tokens = self._tokens
        closing = last - 1
        at = closing - 1
        while at > body and tokens[at - 1] not in (";", "}", "{"):
            at -= 1
        stop = at if tokens[at] == "return" and tokens[at - 1] in (";", "}") and tokens[closing - 1] == ";" else closing
        self._body_of_main(body, stop)
        self._out.append(" pbotvm_end_of_main(); ")
        self._statements_of(stop, last)

    # Statements ------------------------------------------------------------------------------------------------------

    def _statements_of(self, first: int, last: int) -> None:
        """Write tokens `first` to before `last`, each statement in a place of its own."""
        tokens = self._tokens
        at = begin = first
        while at < last:
            mark = tokens[at]
            if mark in ("(", "[") and at < tokens.match[at] < last:
                at = tokens.match[at] + 1
                continue
            if mark == "{" and not self._compound(at) and at < tokens.match[at] < last:
                at = tokens.match[at] + 1
                continue
            at += 1
            if mark in (";", "{", "}") and tokens[at] not in (";", ",") and not self._told(begin):
                self._write(begin, at)
                begin = at
        if begin < last:
            self._write(begin, last)

    def _told(self, first: int) -> bool:
        """Tell whether a statement that begins with token `first` can have no place of its own any more."""
        if self._breaks >= _BREAKS_MAX:
            return True
        following = self._lines[self._line] if self._line < len(self._lines) else len(self._text)
        return self._part == _PARTS_MAX and self._copied >= 0 and self._tokens.start[first] < following

    def _compound(self, at: int) -> bool:
        """Tell whether the brace opens statements, not a value or a type."""
        before = self._tokens[at - 1]
        return before in (")", "else", "do", "try", ";", "{", "}", ":")

    def _write(self, first: int, last: int) -> None:
        self._place(first)
        self._remember(first, last)
        self._copy(first, last)

    def _remember(self, first: int, last: int) -> None:
        place = f"{self._part}:{self._line}"
        if place in self._statements:
            return
        begin = self._tokens.start[first]
        end = min(self._tokens.end[last - 1], begin + 2 * _STATEMENT_MAX)
        said = " ".join(self._text[begin:end].split())
        at_end = last == len(self._tokens) and said[-1:] not in (";", "}")
        said += ";" if self._tokens[last] == ";" or at_end else ""
        said = _EMPTY.sub(";", said)
        self._statements[place] = said[:_STATEMENT_MAX]

    def _place(self, first: int, *, always: bool = False) -> None:
        """Say where in the caller's text token `first` stands."""
        if first >= len(self._tokens):
            return
        begin = self._tokens.start[first]
        line = bisect_right(self._lines, begin)
        if self._breaks >= _BREAKS_MAX and not always:
            return
        part = min(self._part + 1, _PARTS_MAX) if line == self._line else 0
        if not always and part == self._part and line == self._expected(begin):
            self._line = line
            return
        self._breaks += 1
        self._used_parts = max(self._used_parts, part)
        file = f"{part}/{self._options.file}" if part else self._options.file
        column = min(begin - self._lines[line - 1], _COLUMNS_MAX)
        self._put(f'\n#line {line} "{file}"\n{" " * column}', part=part, line=line)

    def _put(self, text: str, *, part: int, line: int) -> None:
        self._out.append(text)
        self._part, self._line = part, line
        self._copied = -1

    _copied = -1  # up to which character the text was copied without a gap

    def _expected(self, begin: int) -> int:
        """Return the line that a compiler takes `begin` for, when only blanks lie between it and what was copied."""
        if self._copied < 0 or self._text[self._copied : begin].strip():
            return -1
        self._out.append(self._text[self._copied : begin])
        return bisect_right(self._lines, begin)

    def _copy(self, first: int, last: int) -> None:
        if first < last:
            self._out.append(self._text[self._tokens.start[first] : self._tokens.end[last - 1]])
            self._copied = self._tokens.end[last - 1]

    def _directive(self, item: tuple[int, int, int, bool]) -> None:
        begin, end, _before, _main = item
        line = bisect_right(self._lines, begin)
        self._put(f'\n#line {line} "{self._options.file}"\n', part=0, line=line)
        self._out.append(self._text[begin:end] + "\n")
        self._line = 0  # the next statement says where it stands

    # The last statement ----------------------------------------------------------------------------------------------

    def _final(self, pieces: Sequence[Piece]) -> tuple[int, int] | None:
        """Return the tokens of the last statement when it has a value to show, else None."""
        tokens = self._tokens
        if not pieces or not self._options.prelude or self._debugger:
            return None
        last = pieces[-1].last
        end = last - 1 if tokens[last - 1] == ";" else last
        at = end - 1
        while at >= pieces[-1].first and tokens[at] not in (";", "{", "}"):
            at = tokens.match[at] - 1 if tokens[at] in (")", "]") and tokens.match[at] >= 0 else at - 1
        first = at + 1
        if first >= end or (at >= pieces[-1].first and tokens[at] != ";"):
            return None
        if any(first <= before <= end for _begin, _end, before in self._tokens.directives if before):
            return None
        return (first, end) if self._has_value(first, end) else None

    def _has_value(self, first: int, end: int) -> bool:
        tokens = self._tokens
        if tokens[first] in DECLARING and tokens[first + 1] != "(":
            return False
        words = False
        for at in range(first, end):
            mark = tokens[at]
            word = tokens.is_word(at)
            words = words or word or tokens.kind[at] == NUMBER or mark[:1] in "\"'"
            if word and _LOUD.fullmatch(mark):
                return False
            if mark in ("=", "?:", "#") or (
                len(mark) in (2, 3) and mark[-1] == "=" and mark not in ("==", "!=", "<=", ">=")
            ):
                return False
            beside = word and tokens.is_word(at + 1) and at + 1 < end
            if beside and mark not in (
                "sizeof",
                "struct",
                "union",
                "enum",
                "unsigned",
                "signed",
                "long",
                "short",
                "const",
            ):
                return False
        pointer = tokens.is_word(first) and tokens[first + 1] == "*" and tokens.is_word(first + 2)
        known = tokens[first] in _KNOWN_TYPES or tokens[first].endswith("_t")
        return words and not (pointer and known and first + 3 == end)

    def _final_statement(self, first: int, end: int) -> None:
        """Write the last statement, and what keeps its value."""
        tokens = self._tokens
        said = " ".join(self._text[tokens.start[first] : tokens.end[end - 1]].split())
        if len(said) > _STATEMENT_MAX or "??" in said:
            self._statements_of(first, end)
            return
        self._last = True
        quoted = said.replace("\\", "\\\\").replace('"', '\\"')
        if self._is_place(first, end):  # the debugger reads it, so that arrays stay arrays
            self._write(first, end)
            self._out.append(f'\n#line 1 "{OURS}/{self._options.file}"\n; pbotvm_last_place("{quoted}");')
            return
        self._out.append("\n#ifndef PBOTVM_PLAIN\nif (0) {")
        self._write(first, end)
        # The warnings of this copy are not shown, see build.py.
        place = f'#line {self._line} "{OURS}-{self._part}/{self._options.file}"'
        self._out.append(f';}}\n{place}\nPBOTVM_LAST("{quoted}", (')
        self._copy(first, end)
        folder = f"{self._part}/" if self._part else ""
        self._out.append(f'\n))\n#else\n#line {self._line} "{folder}{self._options.file}"\n')
        self._copy(first, end)
        self._out.append(";\n#endif\n")
        self._line, self._copied = 0, -1

    def _is_place(self, first: int, end: int) -> bool:
        """Tell whether the tokens only name something: `a`, `a[1]`, `p->x`, `*p`."""
        tokens = self._tokens
        allowed = all(
            tokens.is_word(at) or tokens.kind[at] == NUMBER or tokens[at] in (".", "->", "[", "]", "*")
            for at in range(first, end)
        )
        stars = [at for at in range(first, end) if tokens[at] == "*"]
        return (
            allowed
            and tokens[first] != "sizeof"
            and tokens.kind[first] != NUMBER
            and stars == list(range(first, first + len(stars)))
        )

    def _warning(self) -> str:
        """Return what to tell somebody who forgot to end a directive."""
        directives = self._tokens.directives
        if not directives or "\n" in self._text.strip():
            return ""
        begin, end, _before = directives[-1]
        said = self._text[begin:end]
        if end < len(self._text) or _INCLUDE.match(said, 1) or not re.search(r"[;{}]", said):
            return ""
        return "warning: preprocessor directive not terminated by \\n, the remainder of the line will be part of this directive"


__all__ = ["BLOCK", "COMMANDS", "DECLARATION", "OURS", "Options", "Prepared", "prepare"]
