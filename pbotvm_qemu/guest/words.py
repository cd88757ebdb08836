"""How the predecessor cuts a line into words. Both ends need it: for a request's options, and for arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def spans(text: str) -> Sequence[tuple[int, int]]:
    """Return begin and end of each word: cut at blanks outside quotes; an unbalanced quote is an ordinary character."""
    found = []
    position = 0
    # Whether a closing quote is still to come is asked once per kind, so that a line of quotes stays linear.
    last = {quote: text.rfind(quote) for quote in "'\""}
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        start = position
        while position < len(text) and not text[position].isspace():
            character = text[position]
            if character == "\\":
                position += 2
            elif character in last and last[character] > position:
                position = text.index(character, position + 1) + 1
            else:
                position += 1
        found.append((start, min(position, len(text))))
    return found


def split(text: str, *, resolve: bool = False) -> tuple[str, ...]:
    """Return the words of an argument string: quotes join and are removed.

    Backslashes stay, as the predecessor has it for most languages; with `resolve` they protect the next character and
    are removed, as it has it for C.
    """
    arguments: list[str] = []
    for start, end in spans(text):
        word = text[start:end]
        parts: list[str] = []
        position = 0
        while position < len(word):
            character = word[position]
            close = word.find(character, position + 1) if character in "'\"" else -1
            if close > 0:
                parts.append(word[position + 1 : close])
                position = close + 1
            else:
                step = 2 if character == "\\" else 1
                piece = word[position : position + step]
                parts.append(piece[1:] if resolve and len(piece) > 1 else piece)
                position += step
        arguments.append("".join(parts))
    return tuple(arguments)
