"""Fixtures by stage of a machine's life: an environment, a machine that was created, one that is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import support

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def vm_env() -> Iterator[dict[str, str]]:
    """An environment in which a stopped machine of languages `core` exists. Made once for the run."""
    if reason := support.missing_for_vm():
        pytest.skip(reason)
    for env in support.environment("test-vm"):
        result = support.cli(env, "create", timeout=1800)
        assert result.returncode == 0, result.stderr.decode()
        yield env


@pytest.fixture
def kept_env(vm_env: dict[str, str]) -> Iterator[dict[str, str]]:
    """The same with the machine kept by `run`, and so with the relay listening."""
    result = support.cli(vm_env, "run", "--detach")
    assert result.returncode == 0, result.stderr.decode()
    yield vm_env
    support.cli(vm_env, "stop")
