"""Fixtures by stage of a machine's life: an environment, a machine that was created, one that is kept in either way."""

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
    """The same with the machine kept by `run` as clones, and so with the relay listening."""
    yield from kept(vm_env, "clone")


@pytest.fixture
def disk_env(vm_env: dict[str, str]) -> Iterator[dict[str, str]]:
    """The same with the machine kept in the way `restart`: one QEMU that has the machine's own disk."""
    yield from kept(vm_env, "restart")


def kept(env: dict[str, str], way: str) -> Iterator[dict[str, str]]:
    result = support.cli(env, "run", "--detach", "--revert", way)
    assert result.returncode == 0, result.stderr.decode()
    try:
        yield env
    finally:
        support.cli(env, "stop")


@pytest.fixture
def name(vm_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The machine's name, with its folders in our own environment, for tests of the Python API."""
    for variable in ("XDG_DATA_HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, vm_env[variable])
    yield vm_env["PBOTVM_DOMAIN"]
    assert support.machine_qemus(vm_env) == []
