"""What the guest takes for a network, and what it refuses before it changes anything."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from pbotvm_qemu.guest import network

GOOD: dict[str, Any] = {
    "mac": "02:5f:03:14:0c:b9", "addresses": ["10.0.0.2/24", "fd00::2/64"], "gateway4": "10.0.0.1", "gateway6": "fd00::1",
    "dns": ["9.9.9.9", "2620:fe::fe"], "mtu": 1400,
}  # fmt: skip


def test_a_network_is_understood() -> None:
    found = network.parse(GOOD)
    assert found.mac == bytes.fromhex("025f03140cb9")
    assert found.addresses[0] == (socket.AF_INET, socket.inet_aton("10.0.0.2"), 24)
    assert [family for family, _address in found.gateways] == [socket.AF_INET, socket.AF_INET6]
    assert found.dns == ("9.9.9.9", "2620:fe::fe")
    assert network.parse(GOOD | {"gateway4": None, "gateway6": None, "dns": []}).gateways == ()


@pytest.mark.parametrize(
    "change",
    [
        {"mac": None}, {"mac": "02:5f"}, {"mac": "01:00:5e:00:00:01"}, {"mac": "zz:zz:zz:zz:zz:zz"}, {"mtu": "1500"}, {"mtu": True},
        {"mtu": 100}, {"mtu": 1 << 20}, {"addresses": "10.0.0.2/24"}, {"addresses": ["10.0.0.2"]}, {"addresses": ["10.0.0.2/33"]},
        {"addresses": ["10.0.0.2/-1"]}, {"addresses": [7]}, {"addresses": ["10.0.0.2/24"] * 9}, {"gateway4": "x"}, {"gateway6": 7},
        {"dns": ["nameserver\nx"]}, {"dns": [None]}, {"dns": ["9.9.9.9\0"]}, {"gateway4": "\ud800"},
        {"addresses": ["10.0.0.2/" + "9" * 5000]},
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(network.BadNetworkError, match="network: "):
        network.parse(GOOD | change)


@pytest.mark.parametrize("value", [None, True, [], "on", 7])
def test_what_is_no_network_is_refused(value: object) -> None:
    with pytest.raises(network.BadNetworkError):
        network.resume(value)


def test_without_a_card_the_command_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "CARD", "nocard0")
    monkeypatch.setattr(network, "STATE", "/nowhere/network.json")
    for words, status in ((["off"], 1), (["on"], 1), (["status"], 1), ([], 2), (["up"], 2)):
        assert network.main(words) == status
    assert "made without one" in capsys.readouterr().out
