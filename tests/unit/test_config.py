"""Configuration: which source wins, and whether each mistake says where it stands."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbotvm_qemu import config
from pbotvm_qemu.config import Config
from pbotvm_qemu.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_defaults_hold_without_file_and_environment(file: Path) -> None:
    assert config.load(file, {}) == Config()
    assert Config().machine.name == "pbot-vm"


def test_file_is_beaten_by_environment_which_is_beaten_by_the_command_line(file: Path) -> None:
    file.write_text("[relay]\nport = 1001\nqueue = 5\n")
    assert config.load(file, {}).relay.port == 1001
    loaded = config.load(file, {"PBOTVM_PORT": "1002"})
    assert (loaded.relay.port, loaded.relay.queue) == (1002, 5)
    changed = config.override(loaded, "relay", port=1003, host=None)
    assert (changed.relay.port, changed.relay.host) == (1003, "127.0.0.1")


def test_every_table_and_dashes_in_keys(file: Path) -> None:
    file.write_text('[machine]\ndisk-size = "2G"\n[limits]\nwall = 3\n[relay]\nqueue-wait = 1.5\n')
    loaded = config.load(file, {})
    assert (loaded.machine.disk_size, loaded.limits.wall, loaded.relay.queue_wait) == (2 << 30, 3.0, 1.5)
    assert isinstance(loaded.limits.wall, float)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[nowhere]\nx = 1", r"unknown table \[nowhere\]"),
        ("[machine]\nmemmory = 1", r"unknown key 'memmory' in \[machine\]"),
        ("memory = 1", "'memory' stands outside a table"),
        ("[machine", "Expected"),
        ("[machine]\ncpus = 'two'", "cpus is 'two', not a number"),
        ("[machine]\ncpus = 1.5", "cpus is 1.5, not a whole number"),
        ("[machine]\ncpus = true", "cpus is true, not a whole number"),
        ("[machine]\ncpus = 0", "cpus is 0, out of range"),
        ("[machine]\ncpus = [1]", r"cpus is \[1\], not a whole number"),
        ("[machine]\nname = 7", "name is 7, not a text"),
        ("[machine]\ncid = 2", "cid 2 is reserved"),
        ("[machine]\nmemory = '1M'", "memory is 1M, out of range"),
        ("[limits]\nwall = nan", "wall is nan, out of range"),
        ("[limits]\nwall = inf", "wall is inf, out of range"),
        ("[relay]\nport = 65536", "port is 65536, out of range"),
        ("[relay]\nport = -1", "port is -1, out of range"),
    ],
)
def test_mistake_in_the_file_is_named_with_the_file(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        config.load(file, {})
    assert str(file) in str(caught.value)
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_file_that_is_no_text_is_named(file: Path) -> None:
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"cannot read .*config\.toml"):
        config.load(file, {})


def test_folder_in_the_place_of_the_file_is_named(file: Path) -> None:
    file.mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*config\.toml"):
        config.load(file, {})


@pytest.mark.parametrize(
    ("variable", "value", "table", "name", "wanted"),
    [
        ("PBOTVM_DOMAIN", "other", "machine", "name", "other"),
        ("PBOTVM_SERIAL", "1", "machine", "serial", 1),
        ("PBOTVM_HEALTH", "2", "machine", "health", 2),
        ("PBOTVM_HEART", "3", "machine", "health", 3),
        ("PBOTVM_CID", "0", "machine", "cid", 0),
        ("PBOTVM_TIMEOUT", "4", "limits", "wall", 4.0),
        ("PBOTVM_ADDR", "::1", "relay", "host", "::1"),
        ("PBOTVM_HOST", "::2", "relay", "host", "::2"),
        ("PBOTVM_PORT", "5", "relay", "port", 5),
        ("PBOTVM_SERVER", "6", "relay", "port", 6),
    ],
)
def test_variables_of_both_eras_work(
    file: Path, variable: str, value: str, table: str, name: str, wanted: object
) -> None:
    assert getattr(getattr(config.load(file, {variable: value}), table), name) == wanted


def test_newer_variable_wins_and_an_empty_one_does_not_count(file: Path) -> None:
    assert config.load(file, {"PBOTVM_HEART": "1", "PBOTVM_HEALTH": "2"}).machine.health == 2
    assert config.load(file, {"PBOTVM_HEART": "1", "PBOTVM_HEALTH": ""}).machine.health == 1
    assert config.load(file, {"PBOTVM_SERVER": "1", "PBOTVM_PORT": "2"}).relay.port == 2
    assert config.load(file, {"PBOTVM_HOST": "a", "PBOTVM_ADDR": "b"}).relay.host == "b"


@pytest.mark.parametrize(
    ("variable", "value"),
    [("PBOTVM_PORT", "x"), ("PBOTVM_PORT", "70000"), ("PBOTVM_CID", "1"), ("PBOTVM_TIMEOUT", "nan")],
)
def test_mistake_in_the_environment_is_named_with_the_variable(file: Path, variable: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"environment variable {variable}"):
        config.load(file, {variable: value})


def test_mistake_on_the_command_line_is_named_so() -> None:
    with pytest.raises(ConfigError, match="command line: cpus"):
        config.override(Config(), "machine", cpus=1000)


def test_what_was_said_explicitly_is_known(file: Path) -> None:
    file.write_text("[machine]\ncpus = 2\n")
    loaded = config.load(file, {"PBOTVM_SERIAL": "1"})
    assert loaded.explicit == {"serial"}
    assert config.override(loaded, "machine", memory="1G", cpus=None).explicit == {"serial", "memory"}


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("4096", 4096), ("1k", 1024), ("512M", 512 << 20), (" 12 GiB ", 12 << 30), ("1TB", 1 << 40)],
)
def test_size_is_read(text: str, count: int) -> None:
    assert config.parse_size(text) == count


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "1X", "1 2", "9" * 13, "1e3", "0x10"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        config.parse_size(text)


@given(st.integers(0, 1023), st.sampled_from("KMGT"))
def test_size_reads_back_as_it_was_written(number: int, unit: str) -> None:
    count = config.parse_size(f"{number}{unit}")
    assert config.parse_size(config.format_size(count)) == count


@pytest.mark.parametrize("name", ["a", "pbot-vm", "A.b_c-9", "x" * 40])
def test_machine_name_passes(name: str) -> None:
    assert config.machine_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "a/b", "a b", "x" * 41, "ü", "a\n", "a\0"])
def test_name_that_is_no_folder_and_socket_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a machine"):
        config.machine_name(name)


@pytest.mark.parametrize("text", ["[machine]\nmemory = 'lots'", "[machine]\nname = 'a/b'"])
def test_bad_size_and_bad_name_are_mistakes_of_the_file(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(file, {})
    assert str(file) in str(caught.value)


def test_file_nested_without_end_is_a_mistake(file: Path) -> None:
    file.write_text("x = " + "[" * 20_000)
    with pytest.raises(ConfigError):
        config.load(file, {})


def test_a_network_is_read_and_checked(file: Path) -> None:
    file.write_text(
        '[machine]\nnet = "nat"\n[network]\negress = "listed"\nallow = ["192.0.2.0/24:443/tcp"]\nrate = "1M"\nforward = ["8080:80"]\n'
    )
    found = config.load(file, {})
    assert found.machine.net == "nat"
    policy = found.network.policy()
    assert policy.rate == 1 << 20
    assert [str(entry) for entry in policy.allow] == ["192.0.2.0/24:443/tcp"]
    assert [str(entry) for entry in policy.forward] == ["8080:80/tcp"]


def test_a_machine_has_a_policy_of_its_own(file: Path) -> None:
    file.write_text('[network]\nrate = "1M"\n[network.machines.a]\nallow = ["192.0.2.1"]\nrate = "2K"\n')
    network = config.load(file, {}).network
    assert (network.of("a").rate, network.of("a").allow) == (2048, ("192.0.2.1",))
    assert (network.of("b").rate, network.of("b").allow) == (1 << 20, ())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[machine]\nnet = 'vpn'", "net is 'vpn'"),
        ("[network]\negress = 'all'", "egress is 'all'"),
        ("[network]\nallow = 'x'", 'allow is "x", not a list'),
        ("[network]\nallow = [7]", "allow is no list"),
        ("[network]\nallow = ['example.org']", "allow: 'example.org' is no destination"),
        ("[network]\nforward = ['x']", "forward: 'x' is no port forward"),
        ("[network]\ndns = ['localhost']", "dns: 'localhost' is no IP address"),
        ("[network]\naddresses = ['10.0.0.1']", "addresses: '10.0.0.1' is no range"),
        ("[network]\ngateways = ['x']", "gateways: 'x' is no IP address"),
        ("[network]\nsubnet4 = '10.0.0.0/30'", "subnet4: guests cannot have 10.0.0.0/30"),
        ("[network]\nbridge = 'a-name-of-16-byt'", "bridge: the interface name .* has 16 bytes"),
        ("[network]\nrate = -1", "rate is -1, out of range"),
        ("[network]\npeers = 1", "peers is 1, not true or false"),
        ("[network]\nmachines = 1", "machines has no tables"),
        ("[network.machines.a]\npeers = true", "machines: unknown key 'peers' of a"),
        ("[network.machines.a]\negress = 'all'", "machines.a: egress is 'all'"),
        ("[network.machines.'/']\nrate = 1", "cannot name a machine"),
    ],
)
def test_a_network_that_makes_no_sense_is_named(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        config.load(file, {})
    assert caught.value.hint


def test_every_key_can_be_told_what_it_takes() -> None:
    whole = config.Config()
    kinds = {
        type(getattr(getattr(whole, table), item.name))
        for table in config._TABLES
        for item in dataclasses.fields(getattr(whole, table))
        if (table, item.name) != ("network", "machines")  # a table, which has messages of its own
    }
    assert kinds == set(config._KINDS) == set(config._EXAMPLES)
