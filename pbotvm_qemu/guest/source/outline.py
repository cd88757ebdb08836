"""What stands at the top level of a C or C++ text: functions, declarations, statements, directives."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from .tokens import MARK

if TYPE_CHECKING:
    from .tokens import Tokens

FUNCTION, BLOCK, TYPE, DECLARATION, STATEMENT = range(5)

_CONTROL = frozenset(
    "if for while switch do else return goto break continue case default try catch throw delete".split()
)
_NOT_A_NAME = frozenset(
    "if for while switch do else return sizeof alignof _Alignof __alignof__ typeof __typeof__ typeof_unqual decltype catch "
    "__attribute__ __attribute __declspec alignas _Alignas _Static_assert static_assert asm __asm__ __asm noexcept throw "
    "_Generic defined requires _Atomic explicit _BitInt new delete co_return co_yield co_await".split()
)
_AFTER_PARAMETERS = frozenset(
    "const volatile noexcept override final try throw requires mutable asm __asm__ __attribute__ -> : & && [".split()
)
_TYPES = frozenset("struct union enum class".split())
_OUTSIDE_ONLY = frozenset("template namespace concept export module import".split())
DECLARING = frozenset(
    "auto bool char char8_t char16_t char32_t class concept const consteval constexpr constinit double enum explicit extern "
    "float friend inline int long mutable namespace register restrict short signed static struct template thread_local "
    "typedef typename union unsigned using virtual void volatile wchar_t _Alignas _Atomic _BitInt _Bool _Complex "
    "_Decimal32 _Decimal64 _Decimal128 _Imaginary _Noreturn _Static_assert _Thread_local __extension__ __attribute__ "
    "__inline __inline__ __thread __int128 __label__ static_assert alignas typeof __typeof__ typeof_unqual decltype asm "
    "__asm__ __auto_type __const __restrict __signed__ __volatile__ _Float128 __float128 operator".split()
)
_ASSIGNING = frozenset("= += -= *= /= %= &= |= ^= <<= >>=".split())
_EXPRESSION = frozenset("( * & ++ -- + - ! ~ {".split())
_AFTER_OPERAND = _ASSIGNING | frozenset("( [ . -> ++ -- << ; ? + - / % | || ^ == != <= >=".split())
_NEVER_LOCAL = frozenset({"constinit", "inline"})
_STATIC = frozenset({"static", "thread_local", "namespace"})
_AFTER_NAME = frozenset({"=", ";", "{"})
_AFTER_LIST = frozenset({"(", "[", ","})
_NOT_A_TYPE = _NOT_A_NAME | {"using", "enum", "typename", "namespace", "not", "compl"}
_BEFORE_NAME = frozenset({"*", "&", "&&", ">"})
_OLD_STYLE_MAX = 200  # tokens of parameter declarations in front of a body
_DEFINE = re.compile(r"\s*\w*define\s+([A-Za-z_]\w*)(\(?)")


class Piece(NamedTuple):
    """A run of tokens at the top level: `first` to before `last`. `name` is what a function is called."""

    kind: int
    first: int
    last: int
    name: str = ""
    body: int = -1  # the token that opens a function's body


def pieces(tokens: Tokens, *, cpp: bool) -> list[Piece]:
    """Return the top level of `tokens`, every token in exactly one piece."""
    reader = _Reader(tokens, cpp=cpp)
    found = []
    position = 0
    while position < len(tokens):
        piece = reader.piece(position)
        found.append(piece)
        position = piece.last
    return found


def macros(tokens: Tokens) -> dict[str, bool]:
    """Return the macros that the text defines, and whether each takes arguments."""
    found = {}
    for begin, end, _before in tokens.directives:
        if match := _DEFINE.match(tokens.text, begin + 1, end):
            found[match[1]] = bool(match[2])
    return found


class _Reader:
    def __init__(self, tokens: Tokens, *, cpp: bool) -> None:
        self._tokens = tokens
        self._cpp = cpp
        self._macros = macros(tokens)

    def piece(self, first: int) -> Piece:
        """Return the piece that begins with token `first`."""
        tokens = self._tokens
        control = tokens[first] in _CONTROL
        assigned = False
        parameters = -1  # the name in front of a list that may be one of parameters
        initializers = False  # of a constructor
        at = first
        if self._cpp and tokens[first] == "template":
            at = self._after_angles(first + 1)
        while at < len(tokens):
            mark = tokens[at]
            if mark == ";":
                return Piece(self._kind(first, at), first, at + 1)
            if mark in _ASSIGNING:
                assigned = assigned or tokens[at - 1] != "operator"
                parameters = -1 if assigned else parameters
            if mark == "(" and tokens.match[at] > at:
                close = tokens.match[at]
                if not assigned and not control and not initializers:
                    parameters = self._name(first, at, close, parameters)
                    body = self._old_style_body(at, close) if parameters >= 0 and not self._cpp else -1
                    if body >= 0:
                        return self._function(first, parameters, body)
                at = close + 1
                continue
            if mark == "[" and tokens.match[at] > at:
                at = tokens.match[at] + 1
                continue
            initializers = initializers or (mark == ":" and parameters >= 0)
            if mark == "{":
                close = tokens.match[at]
                if parameters >= 0 and not (initializers and self._initializes(at, close)):
                    return self._function(first, parameters, at)
                last = min(close + 1, len(tokens))
                if not self._goes_on(first, at, last, assigned=assigned, control=control):
                    return self._block(first, at, last, control=control)
                at = last
                continue
            if mark == "}" and at == first:  # without a partner: a piece of its own
                return Piece(DECLARATION, first, first + (2 if tokens[first + 1] == ";" else 1))
            at += 1
        return Piece(self._kind(first, at), first, len(tokens))

    def _function(self, first: int, name: int, body: int) -> Piece:
        tokens = self._tokens
        last = min(tokens.match[body] + 1, len(tokens))
        while self._cpp and tokens[last] == "catch":  # the handlers of a function that is one try block
            opening = tokens.match[last + 1] + 1
            if tokens[opening] != "{":
                break
            last = min(tokens.match[opening] + 1, len(tokens))
        return Piece(FUNCTION, first, last, tokens[name], body)

    def _name(self, first: int, opening: int, close: int, known: int) -> int:
        """Return the token that a function's parameter list at `opening` belongs to, -1 when it cannot be one."""
        tokens = self._tokens
        before = opening - 1
        following = tokens[close + 1]
        fits = following in ("{", "(") or following in _AFTER_PARAMETERS or self._old_style_begins(close + 1)
        if opening == first:
            return -1
        if tokens[before] == ")":  # after a name in parentheses, or a list of parameters of what is returned
            if not fits:
                return -1
            return known if known >= 0 else self._name_within(tokens.match[before], before)
        if not tokens.is_word(before):
            operator = any(tokens[before - step] == "operator" for step in range(3))
            return before if operator and fits else -1
        if tokens[before] in _NOT_A_NAME:
            return known
        if tokens[before] == "operator":  # operator()
            return before
        if tokens[before] in DECLARING and following == "(":  # int (*f(int a))(int) {
            return self._name_within(opening, close)
        if before == first and self._macros.get(tokens[first]):  # a loop that a macro makes
            return -1
        return before if fits else -1

    def _name_within(self, opening: int, close: int) -> int:
        """Return the last name directly inside of parentheses that is no list of arguments: `(*f)` or `(*f(int))`."""
        tokens = self._tokens
        if opening < 0:
            return -1
        at = opening + 1
        while at < min(close, opening + 8):
            if tokens.is_word(at) and tokens[at] not in DECLARING and tokens[at + 1] in ("(", ")"):
                return at
            at += 1
        return -1

    def _old_style_begins(self, at: int) -> bool:
        return not self._cpp and self._tokens.is_word(at) and self._tokens[at] not in _CONTROL

    def _old_style_body(self, opening: int, close: int) -> int:
        """Return where the body opens when declarations of parameters stand before it, as K&R had it; else -1."""
        tokens = self._tokens
        if not self._old_style_begins(close + 1) or tokens[close + 1] in _AFTER_PARAMETERS or close == opening + 1:
            return -1
        for at in range(opening + 1, close):
            if not tokens.is_word(at) if (at - opening) % 2 else tokens[at] != ",":
                return -1
        at = close + 1
        while at < min(close + _OLD_STYLE_MAX, len(tokens)):
            mark = tokens[at]
            if mark == "{" and tokens[at - 1] == ";":
                return at
            if (
                mark == "(" and tokens[at + 1] != "*" and tokens[at - 1] != ")"
            ):  # no declaration of a parameter, but a call
                return -1
            if mark in ("(", "[", "{") and tokens.match[at] > at:
                at = tokens.match[at]
            elif not tokens.is_word(at) and mark not in ("*", ",", ";"):
                return -1
            at += 1
        return -1

    def _initializes(self, at: int, close: int) -> bool:
        """Tell whether braces at `at` set a member in a constructor's list, instead of being the body."""
        tokens = self._tokens
        return (tokens.is_word(at - 1) or tokens[at - 1] == ">") and tokens[close + 1] in (",", "{")

    def _goes_on(self, first: int, at: int, last: int, *, assigned: bool, control: bool) -> bool:
        """Tell whether what begins at `first` goes on after the braces at `at`: a type, a value, an `else`."""
        tokens = self._tokens
        if control:  # if { } else { }, do { } while, try { } catch { } are one statement
            return tokens[last] in ("else", "catch") or (tokens[last] == "while" and tokens[first] == "do")
        if at == first or self._is_block(first, at):
            return False
        before = tokens[at - 1]
        if assigned or before in ("=", "return", ",") or tokens[first] == "typedef":
            return True
        types = any(tokens[index] in _TYPES for index in range(first, min(at, first + 12)))
        return (
            types or (self._cpp and (tokens.is_word(at - 1) or before in (">", "]"))) or tokens[last] in (";", ",", ".")
        )

    def _is_block(self, first: int, at: int) -> bool:
        tokens = self._tokens
        words = {tokens[index] for index in range(first, min(at, first + 4))}
        linkage = tokens[first] == "extern" and tokens[first + 1].startswith('"') and at == first + 2
        return linkage or "namespace" in words

    def _block(self, first: int, at: int, last: int, *, control: bool) -> Piece:
        kind = BLOCK if not control and self._is_block(first, at) else STATEMENT
        return Piece(kind, first, last)

    def _kind(self, first: int, end: int) -> int:
        """Return what ends with the `;` at `end`."""
        tokens = self._tokens
        word = tokens[first]
        if self._cpp and (word in _OUTSIDE_ONLY or (not self._executes(first) and self._defines_member(first, end))):
            return BLOCK
        if word in _TYPES and tokens[end - 1] == "}" and tokens[tokens.match[end - 1] - 1] != "=":
            return TYPE
        return STATEMENT if self._executes(first) else DECLARATION

    def _defines_member(self, first: int, end: int) -> bool:
        """Tell whether a declaration can stand in no function: `int s::n = 4;`, `constinit int n = 4;`."""
        tokens = self._tokens
        begin = {tokens[index] for index in range(first, min(first + 4, end))}
        if begin & _NEVER_LOCAL and not begin & _STATIC:
            return True
        at, depth = first, 0
        while at < end and (tokens[at] not in _AFTER_NAME if depth else tokens[at] not in _AFTER_NAME | _AFTER_LIST):
            depth += (tokens[at] == "<") - (tokens[at] == ">")
            at += 1
        name = at - 1
        if not tokens.is_word(name) or tokens[name - 1] != "::":
            return False
        while name > first and tokens[name - 1] == "::":  # back to where the qualified name begins
            name = self._before_angles(first, name - 2)
        before = tokens[name - 1]
        return name > first and (before in _BEFORE_NAME or (tokens.is_word(name - 1) and before not in _NOT_A_TYPE))

    def _before_angles(self, first: int, at: int) -> int:
        """Return the name that the token `at` belongs to: itself, or what stands before its `<...>`."""
        tokens = self._tokens
        depth = 0
        while at > first and (depth or tokens[at] == ">"):
            depth += (tokens[at] == ">") - (tokens[at] == "<")
            at -= 1
        return at

    def _executes(self, first: int) -> bool:
        """Tell whether a piece can stand in a function only."""
        tokens = self._tokens
        word = tokens[first]
        if word in DECLARING:
            return False
        if not tokens.is_word(first):
            return word in _EXPRESSION or tokens.kind[first] != MARK
        if word in _CONTROL:
            return True
        if word in self._macros:
            return False
        at = first + 1
        while tokens[at] == "::" and tokens.is_word(at + 1):
            at += 2
        return tokens[at] in _AFTER_OPERAND or (tokens[at] == "," and tokens.is_word(first))

    def _after_angles(self, at: int) -> int:
        """Return the token after `<...>` at `at`."""
        tokens = self._tokens
        depth = 0
        while at < len(tokens) and tokens[at] not in ("{", ";"):
            mark = tokens[at]
            depth += (mark == "<") - (mark == ">")
            at += 1
            if depth <= 0:
                return at
        return at
