"""A machine on a host whose kernel has vsock: any such host, or the outer guest of `scripts/test-nested`."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import config, image, paths, plan, qmp, request, state, transports, ways
from pbotvm_qemu.languages import Registry
from tests import support

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from pbotvm_qemu.channel import Stream
    from pbotvm_qemu.machine import VirtualMachine

NESTED = bool(os.environ.get("PBOTVM_NESTED"))  # in the outer guest, where nothing may be skipped


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not NESTED and not plan.has_vsock():
        reason = "/dev/vhost-vsock cannot be opened; scripts/test-nested runs these tests in a guest that has it"
        for item in items:
            if "tests/vsock/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=reason))


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that was created on a host with vsock."""

    record: state.MachineRecord
    plan: plan.Plan

    @property
    def name(self) -> str:
        """What it is called."""
        return self.record.name

    def way(self, name: str) -> ways.Way:
        """Return a way to clean copies of it."""
        return ways.choose(self.plan, self.record.fingerprint, name)

    def over(self, transport: str) -> Machine:
        """Return the same machine, reached over `transport`."""
        return replace(self, plan=replace(self.plan, transport=transport))

    @asynccontextmanager
    async def clone(self, **changes: object) -> AsyncIterator[VirtualMachine]:
        """Give a clone, with `changes` of its hardware's configuration."""
        way = self.way("clone")
        way.plan = replace(way.plan, config=replace(way.plan.config, **changes))  # type: ignore[arg-type]
        vm = await way.start()
        try:
            yield vm
        finally:
            await vm.stop()


@pytest.fixture(scope="session")
def env(request: pytest.FixtureRequest) -> dict[str, str]:
    """The environment in which the machine exists: in the outer guest it was made beforehand."""
    if NESTED:
        return dict(os.environ)
    found: dict[str, str] = request.getfixturevalue("vm_env")
    return found


@contextmanager
def patient(env: dict[str, str]) -> Iterator[None]:
    """Have the Python API find the machine of `env`, and wait as long as an emulated host takes."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("XDG_DATA_HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
            if variable in env:
                patch.setenv(variable, env[variable])
        if NESTED:  # a second is nothing there
            patch.setattr(transports, "FALL_BACK", 30.0)
            patch.setattr("pbotvm_qemu.machine._WAKE_TIMEOUT", 30.0)
            patch.setattr("pbotvm_qemu.machine.BOOT_TIMEOUT", {"kvm": 900.0, "tcg": 900.0})
            patch.setattr("pbotvm_qemu.machine.RESTORE_TIMEOUT", {"kvm": 120.0, "tcg": 120.0})
            patch.setitem(qmp.connect.__wrapped__.__kwdefaults__, "timeout", 120.0)  # type: ignore[attr-defined]
        yield


@pytest.fixture
def machine(env: dict[str, str]) -> Iterator[Machine]:
    """The machine through the Python API, reached over vsock."""
    with patient(env):
        yield from _machine(env)


def _machine(env: dict[str, str]) -> Iterator[Machine]:
    record = state.ready(env["PBOTVM_DOMAIN"])
    own = plan.Plan.of(record, image.Image.load(record.image), loadvm=config.SNAPSHOT)
    assert own.vsock, "the machine was made without vsock"
    yield Machine(record, replace(own, transport="vsock"))
    assert support.machine_qemus(env | {"XDG_DATA_HOME": str(paths.data_dir().parent)}) == []


async def run(vm: VirtualMachine, code: str, *, wall: float = 60.0) -> str:
    """Return what a shell program prints in the guest."""
    said = bytearray()

    async def keep(_stream: Stream, data: bytes) -> None:
        said.extend(data)

    language = Registry.load(paths.user_languages()).find("sh", ("sh",))
    spec, content = request.render(
        request.Request(language="sh"), language, replace(config.Limits(), wall=wall), stdin=False, code=code.encode()
    )
    outcome = await vm.execute(spec, content, on_output=keep)
    assert outcome.exit_code == 0, (outcome, said)
    return said.decode()
