"""The relay for tests of callers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.compat import peers
from tests.compat.door import CONFIG, Door

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with peers.host_pool() as pool:
        opened = Door(CONFIG, pool, tmp_path / "history")
        async with opened.relay:
            yield opened
        await opened.desk.close()
