"""The address plan: no two guests share anything, and no subnet clashes."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_network

import pytest

from pbotvm_qemu.errors import NetworkError
from pbotvm_qemu.network import addresses

PLAN = addresses.own_plan("nat", b"host", IPv4Network("10.213.176.0/20"), addresses.subnet6(b"host", "nat"))


def test_every_number_has_its_own_name_mac_and_addresses() -> None:
    guests = [PLAN.guest(number) for number in range(PLAN.room)]
    for kind in ("tap", "mac", "addresses", "link_local"):
        assert len({getattr(guest, kind) for guest in guests}) == PLAN.room
    assert all(len(guest.tap) <= 15 for guest in guests)
    for guest in (guests[0], guests[-1]):
        for address in guest.plain:
            assert any(address in net for net in PLAN.networks)
            assert address not in PLAN.gateways
    for number in (-1, PLAN.room):
        with pytest.raises(NetworkError) as caught:
            PLAN.guest(number)
        assert caught.value.hint


def test_guests_of_different_networks_and_hosts_share_no_mac() -> None:
    other = addresses.own_plan("isolated", b"host", IPv4Network("10.213.208.0/20"), None)
    foreign = addresses.bridged_plan(b"another", ["10.0.0.1-10.0.0.9/24"], ["10.0.0.254"])
    assert len({PLAN.guest(3).mac, other.guest(3).mac, foreign.guest(3).mac, addresses.bridge_mac(b"host", "nat")}) == 4
    first = int(PLAN.guest(0).mac[:2], 16)
    assert first & 1 == 0  # not a group
    assert first & 2 == 2  # made up locally


def test_the_name_of_a_tap_tells_network_and_number() -> None:
    assert addresses.tap_number("pbtn12") == ("nat", 12)
    assert addresses.tap_number("pbti0") == ("isolated", 0)
    assert addresses.tap_number("pbtb3999") == ("bridge", 3999)
    for name in ("pbtn", "pbtx1", "tap0", "pbtn1x", "pbtn123456"):
        assert addresses.tap_number(name) is None


def test_link_local_is_what_the_kernel_makes() -> None:
    assert str(addresses.link_local("02:5f:03:14:0c:b9")) == "fe80::5f:3ff:fe14:cb9"


def test_a_subnet_that_is_free() -> None:
    assert str(addresses.choose4([])) == addresses.CANDIDATES4[0]
    taken = [ip_network("10.0.0.0/8"), ip_network("0.0.0.0/0"), ip_network("fd00::/8")]
    assert str(addresses.choose4(taken)) == addresses.CANDIDATES4[1]
    everything = [ip_network(net) for net in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")]
    with pytest.raises(NetworkError, match="every subnet") as caught:
        addresses.choose4(everything)
    assert caught.value.hint
    with pytest.raises(NetworkError, match=r"overlaps 10\.0\.0\.0/8"):
        addresses.choose4(everything, "10.42.0.0/20")


def test_an_ipv6_subnet_is_always_the_same_and_nobody_elses() -> None:
    found = {addresses.subnet6(host, name) for host in (b"a", b"b") for name in addresses.NAMES}
    assert len(found) == 6
    assert all(net.prefixlen == 64 and str(net).startswith("fd") for net in found)


def test_guests_of_ordinary_users_have_numbers_that_machines_of_root_do_not_get() -> None:
    plan = addresses.bridged_plan(b"host", ("192.0.2.10-192.0.2.19/24",), ())
    assert (plan.room, plan.helped_room) == (10, 5)
    helped = [plan.helped(number) for number in range(5)]
    assert [guest.tap for guest in helped] == [f"tap{number}" for number in range(5)]
    assert {guest.number for guest in helped} == set(range(5, 10))
    with pytest.raises(NetworkError, match="room for 5 guests of ordinary users") as caught:
        plan.helped(5)
    assert caught.value.hint
    assert addresses.own_plan("isolated", b"host", IPv4Network("10.0.0.0/24"), None).helped_room == 0
