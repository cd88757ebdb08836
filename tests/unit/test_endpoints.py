"""Which machines a request may choose: config.toml, and the predecessor's own file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from pbotvm_qemu import config
from pbotvm_qemu.endpoints import Endpoint
from pbotvm_qemu.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

# As the predecessor ships it.
TODAY = {
    "machines": {
        "pbot-vm": {"addr": "127.0.0.1", "serial": 5555, "health": 5556, "cid": 7, "vport": 5555, "vagrant": 0},
        "pbot-test-vm": {"addr": "127.0.0.1", "serial": 7777, "health": 7778, "cid": 42, "vport": 5555, "vagrant": 1},
    },
    "aliases": {"main": "pbot-vm", "test": "pbot-test-vm"},
    "default-machine": "main",
}
SEED = {
    "machines": {
        "openSUSE15": {"serial": 5565, "heart": 5566, "cid": 9, "vport": 5555},
        "test-vm": {"serial": 7777, "heart": 7778, "cid": 42, "vport": 5555},
    },
    "aliases": {"openSUSE": "openSUSE15", "test": "test-vm"},
    "default-machine": "openSUSE",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def load(folder: Path, *, old: object = None, toml: str = "", **environment: str) -> config.Config:
    if old is not None:
        (folder / "vm-exec.json").write_text(json.dumps(old))
    (folder / "config.toml").write_text(toml)
    return config.load(folder / "config.toml", environment)


def test_the_predecessors_file_of_today_is_read_as_it_is(folder: Path) -> None:
    found = load(folder, old=TODAY)
    assert found.machine.name == "pbot-vm"
    assert found.endpoints.machines["pbot-test-vm"] == Endpoint(
        name="pbot-test-vm", addr="127.0.0.1", serial=7777, health=7778, cid=42, vport=5555
    )
    assert found.endpoints.shown("pbot-vm") == ["main", "test"]
    assert found.endpoints.resolve("TEST") == "pbot-test-vm"


def test_the_predecessors_file_of_the_seeds_era_is_read_as_it_is(folder: Path) -> None:
    found = load(folder, old=SEED)
    assert (found.machine.name, found.machine.serial, found.machine.health, found.machine.cid) == (
        "openSUSE15", 5565, 5566, 9,
    )  # fmt: skip
    assert found.endpoints.machines["test-vm"].seed
    assert found.endpoints.machines["test-vm"].health == 7778


def test_the_file_is_weaker_than_config_toml_and_that_than_the_environment(folder: Path) -> None:
    toml = '[machine]\nserial = 6000\n[aliases]\ntest = "other"\n[machines.other]\nserial = 1\n'
    found = load(folder, old=SEED, toml=toml, PBOTVM_HEALTH="6001", PBOTVM_HEART="1")
    assert (found.machine.serial, found.machine.health) == (6000, 6001)
    assert found.endpoints.aliases["test"] == "other"
    assert found.endpoints.aliases["openSUSE"] == "openSUSE15"
    assert load(folder, old=SEED, PBOTVM_DOMAIN="mine").machine.name == "mine"


def test_without_aliases_the_names_are_shown(folder: Path) -> None:
    found = load(folder, toml="[machines.two]\nserial = 1\n").endpoints
    assert found.shown("one") == ["one", "two"]


def test_a_revert_command_is_a_list_of_words(folder: Path) -> None:
    found = load(folder, toml='[machines.two]\nserial = 1\nrevert = ["virsh", "snapshot-revert", "two", "1"]\n')
    assert found.endpoints.machines["two"].revert == ("virsh", "snapshot-revert", "two", "1")


@pytest.mark.parametrize(
    "toml",
    [
        "[machines]\ntwo = 1",
        "[machines.two]\nport = 1",
        "[machines.two]\nserial = 70000",
        "[machines.two]\nserial = true",
        "[machines.two]\nserial = '1'",
        "[machines.two]\ncid = 2",
        "[machines.two]\naddr = ''",
        "[machines.two]\nrevert = 'virsh revert'",
        "[aliases]\na = 1",
        "[aliases]\na = ''",
        "[paste]\ncommand = 'curl'",
        "[paste]\ncommand = [1]",
        "[watchdog]\nsamples = 0",
        "[relay]\nno-auth = 1",
    ],
)
def test_a_mistake_names_the_file_and_says_what_to_write(folder: Path, toml: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(folder, toml=toml)
    assert "config.toml" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 20_000, '{"machines":[]}', '{"default-machine":1}'])
def test_a_damaged_vm_exec_json_is_named(folder: Path, text: str) -> None:
    (folder / "vm-exec.json").write_text(text)
    with pytest.raises(ConfigError, match=r"vm-exec\.json"):
        config.load(folder / "config.toml", {})


@pytest.mark.parametrize(("value", "meant"), [("1", True), ("yes", True), ("0", False)])
def test_noreverts_is_true_as_in_perl(folder: Path, value: str, *, meant: bool) -> None:
    assert load(folder, PBOTVM_NOREVERT=value).relay.no_revert is meant


def test_the_token_is_not_shown(folder: Path) -> None:
    assert "s3cret" not in repr(load(folder, PBOTVM_TOKEN="s3cret"))
