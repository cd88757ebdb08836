"""Destinations, forwards and ranges as text: what is understood, and what is refused by name."""

from __future__ import annotations

import ipaddress

import pytest

from pbotvm_qemu.errors import ConfigError
from pbotvm_qemu.network import policy


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("192.0.2.7", "192.0.2.7/32"),
        ("192.0.2.0/24", "192.0.2.0/24"),
        ("192.0.2.0/24:443/tcp", "192.0.2.0/24:443/tcp"),
        (" 0.0.0.0/0:80-90 ", "0.0.0.0/0:80-90"),
        ("2001:db8::1", "2001:db8::1/128"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("[2001:db8::/32]:53/udp", "[2001:db8::/32]:53/udp"),
        ("[2001:db8::1]", "2001:db8::1/128"),
    ],
)
def test_a_destination_is_understood(text: str, said: str) -> None:
    assert str(policy.parse_allow(text)) == said
    assert policy.parse_allow(said) == policy.parse_allow(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "example.org", "192.0.2.1/24", "192.0.2.0/33", "192.0.2.1:0", "192.0.2.1:65536", "192.0.2.1:9-8", "192.0.2.1:80/icmp",
        "[192.0.2.1", "2001:db8::1:80/tcp", "192.0.2.1 drop", "192.0.2.1;accept", "{ 192.0.2.1 }", "192.0.2.1\nflush ruleset", "*:80",
    ],
)  # fmt: skip
def test_what_is_no_destination_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no destination") as caught:
        policy.parse_allow(text)
    assert caught.value.hint


def test_forwards() -> None:
    assert policy.parse_forward("8080:80") == policy.Forward(8080, 80, "tcp")
    assert policy.parse_forward("53:5353/udp") == policy.Forward(53, 5353, "udp")
    for text in ("", "80", "0:80", "80:65536", "80:80/icmp", "a:b", "127.0.0.1:80:80"):
        with pytest.raises(ConfigError, match="is no port forward"):
            policy.parse_forward(text)


def test_ranges() -> None:
    found = policy.parse_range("192.168.1.200-192.168.1.219/24")
    assert len(found) == 20
    assert str(found.network) == "192.168.1.0/24"
    assert len(policy.parse_range("2001:db8::10-2001:db8::1f/64")) == 16
    for text in (
        "",
        "192.168.1.5/24",
        "192.168.1.9-192.168.1.5/24",
        "192.168.1.5-192.168.2.5/24",
        "192.168.1.5-2001:db8::1/24",
        "a-b/24",
    ):
        with pytest.raises(ConfigError, match="is no range"):
            policy.parse_range(text)


def test_subnets_and_interfaces() -> None:
    assert policy.parse_subnet("auto", "x", version=4) == "auto"
    assert policy.parse_subnet("none", "x", version=6) == "none"
    for text, version in (
        ("none", 4),
        ("10.0.0.0/28", 4),
        ("fd00::/48", 6),
        ("10.0.0.0/20", 6),
        ("10.0.0.1/20", 4),
        ("x", 4),
    ):
        with pytest.raises(ConfigError):
            policy.parse_subnet(text, "x", version=version)
    assert policy.parse_interface("br0", "x") == "br0"
    with pytest.raises(ConfigError, match="has 16 bytes, the kernel takes 15"):
        policy.parse_interface("a" * 16, "x")
    for text in ("", "..", "a/b", "a b", 'a"b', "-a", "a;b", "a\n"):
        with pytest.raises(ConfigError):
            policy.parse_interface(text, "x")


@pytest.mark.parametrize(
    "text",
    [*policy.METADATA, "10.1.2.3", "172.31.255.255", "192.168.0.1", "100.64.0.1", "127.0.0.1", "224.0.0.251", "255.255.255.255", "0.0.0.0",
     "::1", "::ffff:10.1.2.3", "64:ff9b::a01:203", "2002:a01:203::1", "fe80::1", "fd12::1", "ff02::1", "fec0::1"],
)  # fmt: skip
def test_what_is_near_is_blocked(text: str) -> None:
    blocked = [ipaddress.ip_network(net) for net in (*policy.BLOCKED4, *policy.BLOCKED6)]
    address = ipaddress.ip_address(text)
    assert any(address in net for net in blocked if net.version == address.version)


@pytest.mark.parametrize("text", ["1.1.1.1", "9.9.9.9", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1"])
def test_what_is_far_is_not(text: str) -> None:
    blocked = [ipaddress.ip_network(net) for net in (*policy.BLOCKED4, *policy.BLOCKED6)]
    address = ipaddress.ip_address(text)
    assert not any(address in net for net in blocked if net.version == address.version)
