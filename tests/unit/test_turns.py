"""Waiting callers take turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu.turns import Turns

if TYPE_CHECKING:
    import asyncio


async def order(turns: Turns[int], places: dict[str, asyncio.Future[int]]) -> list[str]:
    """Serve everybody, and return in which order."""
    served: list[str] = []
    while turns.serve(len(served)):
        served += [name for name, place in places.items() if place.done() and name not in served]
    return served


async def test_one_caller_is_served_in_order_of_arrival() -> None:
    turns: Turns[int] = Turns()
    places = {f"a{number}": turns.join("a") for number in range(4)}
    assert await order(turns, places) == ["a0", "a1", "a2", "a3"]


async def test_a_caller_with_many_requests_delays_another_by_one_place() -> None:
    turns: Turns[int] = Turns()
    places = {f"a{number}": turns.join("a") for number in range(3)}
    places |= {"b0": turns.join("b"), "b1": turns.join("b"), "c0": turns.join("c")}
    assert await order(turns, places) == ["a0", "b0", "c0", "a1", "b1", "a2"]


async def test_who_gave_up_is_passed_over() -> None:
    turns: Turns[int] = Turns()
    first, second = turns.join("a"), turns.join("a")
    first.cancel()
    turns.leave("a", first)
    assert len(turns) == 1
    assert turns.serve(7)
    assert second.result() == 7
    assert not turns.serve(8), "nobody waits, and the item would be lost"


async def test_who_was_cancelled_without_leaving_is_passed_over_too() -> None:
    turns: Turns[int] = Turns()
    first, second = turns.join("a"), turns.join("b")
    first.cancel()
    assert turns.serve(7)
    assert second.result() == 7


async def test_all_are_refused_at_once() -> None:
    turns: Turns[int] = Turns()
    places = [turns.join("a"), turns.join("b")]
    turns.refuse(ValueError("no"))
    for place in places:
        with pytest.raises(ValueError, match="no"):
            await place
    assert len(turns) == 0
