"""Callers who wait for something, served fairly: each caller in turn, and each one's requests in order of arrival."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """A queue of futures. A caller with a hundred requests delays another one's by one place, not by a hundred."""

    def __init__(self) -> None:
        self._callers: OrderedDict[str, deque[asyncio.Future[T]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(places) for places in self._callers.values())

    def join(self, caller: str) -> asyncio.Future[T]:
        """Return a future that will hold what `caller` gets."""
        place: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._callers.setdefault(caller, deque()).append(place)
        return place

    def leave(self, caller: str, place: asyncio.Future[T]) -> None:
        """Give up a place. Nothing happens when it was served already."""
        places = self._callers.get(caller, deque())
        if place in places:
            places.remove(place)
            if not places:
                del self._callers[caller]

    def serve(self, item: T) -> bool:
        """Give `item` to whose turn it is; False when nobody waits."""
        while self._callers:
            caller, places = self._callers.popitem(last=False)
            place = places.popleft()
            if places:
                self._callers[caller] = places  # at the end: the others come first
            if not place.done():
                place.set_result(item)
                return True
        return False

    def refuse(self, error: Exception) -> None:
        """Let everybody who waits have `error` instead."""
        for places in self._callers.values():
            for place in places:
                if not place.done():
                    place.set_exception(error)
        self._callers.clear()
