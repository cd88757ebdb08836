"""A disk that fills up under a running machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import assert_refused, cli, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.vm

Env = dict[str, str]


@pytest.fixture
def small_disk(vm_env: Env) -> Iterator[Env]:
    """A machine whose folder lies on a file system of 900 MiB. The session's fixture has built the image."""
    if os.geteuid():
        pytest.skip("needs root to mount a tmpfs")
    assert vm_env
    for env in environment("small-disk"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900M,mode=0755", "tmpfs", env["XDG_DATA_HOME"]], check=True)
        try:
            result = cli(env, "create", "--memory", "256M", "--languages", "sh,bash,bc,c11,lua,perl,python3,tcl")
            assert result.returncode == 0, result.stderr.decode()
            yield env
            cli(env, "stop")
        finally:
            subprocess.run(["umount", "--lazy", env["XDG_DATA_HOME"]], check=True)


def test_a_snapshot_that_does_not_fit_is_refused_and_the_machine_stays_usable(small_disk: Env) -> None:
    assert cli(small_disk, "start", "--revert", "restart").returncode == 0
    filler = Path(small_disk["XDG_DATA_HOME"]) / "filler"
    room = os.statvfs(filler.parent)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - (24 << 20))
    assert_refused(cli(small_disk, "snapshot", "create", "two"), 125, "snapshot-save")
    assert cli(small_disk, "exec", "-lang=sh", "echo usable").stdout == b"usable\n"
    filler.unlink()
    assert cli(small_disk, "snapshot", "create", "two").returncode == 0
    assert cli(small_disk, "snapshot", "revert", "two").returncode == 0
    assert cli(small_disk, "exec", "-lang=sh", "echo usable").stdout == b"usable\n"
