"""Rules as text: what is in them for which policy. That the kernel takes and keeps them is shown in tests/netns."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Network

from pbotvm_qemu import net
from pbotvm_qemu.network import addresses, netfilter, policy

PLAN = addresses.own_plan("nat", b"host", IPv4Network("10.213.176.0/20"), addresses.subnet6(b"host", "nat"))
GUEST = PLAN.guest(7)
OPEN = policy.Policy()


def chain(text: str, name: str) -> list[str]:
    begin = [f"add rule {family} pbotvm {name} " for family in netfilter.FAMILIES]
    return [line.removeprefix(head) for line in text.splitlines() for head in begin if line.startswith(head)]


def test_the_last_word_on_a_sender_is_no() -> None:
    rules = chain(netfilter.admit(GUEST, PLAN, OPEN), "from-pbtn7")
    assert rules[0] == f"ether saddr != {GUEST.mac} drop"
    assert rules[-1] == "drop"
    assert not [rule for rule in rules if rule == "accept"]


def test_a_policy_decides_the_end_of_the_destinations() -> None:
    assert chain(netfilter.admit(GUEST, PLAN, OPEN), "to-pbtn7")[-1] == "accept"
    listed = policy.Policy(egress="listed", allow=(policy.parse_allow("192.0.2.0/24:443/tcp"),))
    rules = chain(netfilter.admit(GUEST, PLAN, listed), "to-pbtn7")
    assert rules[-2:] == ["ip daddr 192.0.2.0/24 tcp dport 443 accept", "drop"]


def test_what_is_allowed_comes_before_what_is_blocked() -> None:
    near = policy.Policy(allow=(policy.parse_allow("10.1.0.0/16"),))
    rules = chain(netfilter.admit(GUEST, PLAN, near), "to-pbtn7")
    blocked = next(number for number, rule in enumerate(rules) if "10.0.0.0/8" in rule)
    assert rules.index("ip daddr 10.1.0.0/16 accept") < blocked


def test_only_single_addresses_open_this_host() -> None:
    allow = tuple(map(policy.parse_allow, ("0.0.0.0/0:80", "10.213.176.1:443/tcp")))
    rules = chain(netfilter.admit(GUEST, PLAN, policy.Policy(allow=allow)), "host-pbtn7")
    assert rules == ["ip daddr 10.213.176.1/32 tcp dport 443 accept"]


def test_limits_are_there_when_they_are_wanted() -> None:
    assert "limit" not in netfilter.admit(GUEST, PLAN, OPEN)
    text = netfilter.admit(GUEST, PLAN, policy.Policy(rate=1 << 20))
    assert chain(text, "in-pbtn7") == ["limit rate over 1048576 bytes/second burst 262144 bytes drop"]
    assert "ct count over 9" in netfilter.base(netfilter.Base(nat=PLAN, connections=9))
    assert "ct count" not in netfilter.base(netfilter.Base(nat=PLAN))


def test_isolated_guests_have_no_way_out() -> None:
    plan = addresses.own_plan("isolated", b"host", IPv4Network("10.213.208.0/20"), None)
    text = netfilter.admit(plan.guest(7), plan, OPEN)
    assert chain(text, "to-pbti7") == ["ip daddr 10.213.208.0/20 accept", "drop"]
    assert "host-" not in text


def test_a_marker_tells_one_set_of_rules_from_another() -> None:
    base = netfilter.Base(nat=PLAN)
    assert netfilter.marker(base) == netfilter.marker(netfilter.Base(nat=PLAN))
    assert netfilter.marker(base) != netfilter.marker(replace(base, dhcp=True))


def test_forwards_lead_to_the_address_of_the_guest() -> None:
    wanted = policy.Policy(forward=(policy.parse_forward("8080:80"), policy.parse_forward("53:53/udp")))
    assert netfilter.forward_elements(GUEST, wanted) == [
        "forwards_tcp { 8080 : 10.213.176.23 . 80 }", "forwards_udp { 53 : 10.213.176.23 . 53 }",
    ]  # fmt: skip


def test_stale_guests_are_swept_with_all_that_leads_to_them() -> None:
    contents = netfilter.Contents(
        frozenset({("bridge", "from-pbtn7"), ("bridge", "to-pbtn7"), ("bridge", "from-pbtn8"), ("inet", "forward")}),
        (
            ("bridge", "senders", '"pbtn7"', "jump from-pbtn7"),
            ("bridge", "senders", '"pbtn8"', "jump from-pbtn8"),
            ("inet", "forwards_tcp", "8080", "10.213.176.23 . 80"),
        ),
    )
    assert contents.guests == {"pbtn7", "pbtn8"}
    text = contents.sweep({"pbtn7"}, ["10.213.176.23"])
    assert "pbtn8" not in text
    assert 'delete element bridge pbotvm senders { "pbtn7" : jump from-pbtn7 }' in text
    assert "delete element inet pbotvm forwards_tcp { 8080 : 10.213.176.23 . 80 }" in text
    assert text.index("delete chain bridge pbotvm from-pbtn7") < text.index("delete chain bridge pbotvm to-pbtn7")
    assert contents.sweep(set()) == ""


# QEMU's arguments ---------------------------------------------------------------------------------------------------------


def test_no_network_card_unless_asked_for() -> None:
    assert net.policy_arguments("none") == ["-nic", "none"]


def test_the_card_is_the_same_for_every_network() -> None:
    cards = {tuple(net.policy_arguments(mode, taps=(9,))) for mode in ("nat", "isolated", "bridge")}
    assert len(cards) == 1
    ((_option, backend, _device, card),) = cards
    assert backend == "tap,id=net0,fd=9"
    assert "script" not in backend
    assert f"mac={net.MAC}" in card


def test_queues_and_the_kernels_own_backend() -> None:
    argv = net.policy_arguments("nat", taps=(9, 10), vhosts=(11, 12))
    assert argv[1] == "tap,id=net0,fds=9:10,vhost=on,vhostfds=11:12"
    assert argv[3].endswith("mq=on,vectors=6")
    assert net.policy_arguments("nat", taps=(9,), vhosts=(11,))[1] == "tap,id=net0,fd=9,vhost=on,vhostfd=11"
    assert [net.imagined("nat", cpus) for cpus in (1, 2, 64)] == [1, 2, net.QUEUES_MAX]
    assert net.imagined("none", 4) == net.imagined("user", 4) == 0
