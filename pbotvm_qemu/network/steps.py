"""A change of the host, as `net up --dry-run` shows it and `net up` carries it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


@dataclass(frozen=True, slots=True)
class Step:
    """One change, in words and as a deed that can be done again."""

    what: str
    do: Callable[[], Awaitable[None]]
