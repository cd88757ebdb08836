"""What operators use: run logs, metrics, the systemd unit, the health port of clones."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

from pbotvm_qemu import ports, runlog
from pbotvm_qemu.config import MetricsConfig
from pbotvm_qemu.errors import HostError
from pbotvm_qemu.metrics import Metrics
from pbotvm_qemu.runlog import RunLog
from tests.support import free_ports

UNIT = Path(__file__).parents[2] / "contrib/systemd/pbotvm-qemu@.service"


def test_a_value_that_is_not_plain_is_quoted_and_cut() -> None:
    line = runlog.pairs({"a": "plain-1.0", "b": "two words", "c": 'q"\n', "d": "", "e": "x" * 500})
    assert line.startswith('a=plain-1.0 b="two words" c="q\\"\\n" d="" e=xxx')
    assert "\n" not in line
    assert len(line) < 300
    assert json.loads(line.split("c=")[1].split(" d=")[0]) == 'q"\n'


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as page:
        return str(page.read().decode())


async def test_metrics_count_what_ends() -> None:
    runs = RunLog()
    status: dict[str, object] = {"ready": 2, "busy": 1, "runs": 5, "reverts": {"run": 4, "cpu": 1}}
    (port,) = free_ports(1)
    async with Metrics(MetricsConfig(port=port), lambda: status) as metrics:
        runs.watch(metrics.count)
        for result in ("0", "3", "wall", "never-ran"):
            record = runs.begin("relay", caller="x", machine="m")
            record.language, record.result = "sh", result
            runs.end(record)
        text = await asyncio.to_thread(fetch, f"http://{metrics.address}/metrics")
    for result in ("ok", "failed", "wall", "never-ran"):
        assert f'pbotvm_requests_total{{language="sh",result="{result}",source="relay"}} 1.0' in text
    assert "pbotvm_ready 2.0" in text
    assert "pbotvm_runs_total 5.0" in text
    assert 'pbotvm_reverts_total{reason="cpu"} 1.0' in text
    assert 'pbotvm_request_seconds_bucket{le="+Inf"} 4.0' in text


async def test_a_port_that_is_taken_is_named() -> None:
    (port,) = free_ports(1)
    async with Metrics(MetricsConfig(port=port), dict):
        with pytest.raises(HostError, match=str(port)):
            await Metrics(MetricsConfig(port=port), dict).__aenter__()


def test_the_health_of_clones_ends_as_pbots_host_wants_it() -> None:
    lines = ports.health_text({"ready": 1, "busy": 2, "waiting": 0, "runs": 9}).split(b"\r\n")
    assert lines == [b"ready busy waiting runs", b"1 2 0 9", b"", b":END", b""]


def test_systemd_takes_the_unit_and_finds_it_hardened(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed (scripts/setup --dev does not need it, scripts/test installs it)")
    text = UNIT.read_text().replace("/opt/pbotvm-qemu/.venv/bin/pbotvm-qemu", "/bin/true")
    unit = tmp_path / UNIT.name
    unit.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )
    assert not [line for line in done.stderr.splitlines() if UNIT.name in line], done.stderr
    # From 0 (tight) to 100 (open); the default of a service is 96.
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=30", "--no-pager", str(unit)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
