"""Programs that the network tests run inside a guest, as root: Python texts with %-places."""

from __future__ import annotations

import json

TRANSFER = """
import hashlib, socket
where, size = %r, %d
block = bytes(range(256)) * 256
with socket.create_connection((where, 7777), timeout=60) as sock:
    sock.sendall(b"give %%d\\n" %% size)
    digest, left = hashlib.sha256(), size
    while left:
        data = sock.recv(min(left, 1 << 18))
        if not data: raise SystemExit("cut off with %%d bytes to come" %% left)
        digest.update(data)
        left -= len(data)
    print(digest.hexdigest())
    sock.sendall(b"take %%d\\n" %% size)
    for _ in range(size // len(block)): sock.sendall(block)
    print(sock.makefile().readline().strip())
"""

KEEP_TALKING = """
import socket, time
with socket.create_connection((%r, 7777), timeout=60) as sock:
    sock.settimeout(4)
    print("talking", flush=True)
    for _ in range(6000):
        try:
            sock.sendall(b"echo hello\\n")
            if not sock.recv(100): break
        except OSError:
            print("cut")
            break
        time.sleep(0.1)
"""

MANY = """
import socket
kept = []
for number in range(16):
    try:
        # Those that are let through get all the time that they need.
        sock = socket.create_connection((%r, 7777), timeout=60 if number < 8 else 2)
        sock.sendall(b"echo hello\\n")
        if sock.recv(100): kept.append(sock)
    except OSError:
        pass
print(len(kept))
"""

FETCH = """
import socket
with socket.create_connection((%r, 7777), timeout=60) as sock:
    left = %d
    sock.sendall(b"give %%d\\n" %% left)
    while left:
        left -= len(sock.recv(min(left, 1 << 16))) or left
"""

QUEUES = """
import array, fcntl, glob, json, os, socket, struct

def channels():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        told = array.array("I", [0x3C] + [0] * 8)  # ETHTOOL_GCHANNELS
        fcntl.ioctl(sock, 0x8946, struct.pack("16sP", b"eth0", told.buffer_info()[0]) + bytes(16))  # SIOCETHTOOL
        return {"most": told[4], "used": told[8]}

def interrupts():
    lines = [line.split() for line in open("/proc/interrupts") if "-input." in line]
    return {line[-1].rpartition(".")[2]: sum(map(int, line[1:-3])) for line in lines}

def talk(cpu):
    # What a processor sends goes out by its own queue, and the answers come in by the same one.
    os.sched_setaffinity(0, {cpu})
    before = interrupts()
    for _ in range(4):
        with socket.create_connection((%r, 7777), timeout=60) as sock:
            for _ in range(50):
                sock.sendall(b"echo hello\\n")
                assert sock.recv(100)
    return {queue: count - before[queue] for queue, count in interrupts().items()}

print(json.dumps({
    "rx": len(glob.glob("/sys/class/net/eth0/queues/rx-*")), "tx": len(glob.glob("/sys/class/net/eth0/queues/tx-*")),
    "channels": channels(), "talks": [talk(cpu) for cpu in sorted(os.sched_getaffinity(0))],
}))
"""

LEASE = r"""
import os, subprocess
box = "/run/pbotvm/busybox"
with open("/tmp/lease.sh", "w") as file:
    file.write('#!/bin/sh\n[ "$1" = bound ] || exit 0\n')
    file.write(box + ' ip addr add $ip/$mask dev eth0; ' + box + ' ip route add default via $router\n')
    file.write('echo $ip $router $dns $mtu\n')
os.chmod("/tmp/lease.sh", 0o755)
subprocess.run([box, "ip", "link", "set", "eth0", "up"], check=True)
asked = [box, "udhcpc", "-i", "eth0", "-n", "-q", "-f", "-t", "20", "-T", "3", "-O", "mtu", "-s", "/tmp/lease.sh"]
done = subprocess.run(asked, capture_output=True, text=True)
print(done.stdout.strip() or "nothing")
if not done.stdout.strip(): print(done.stderr)
"""

LEASE_OF_STRANGER = LEASE.replace(
    '"ip", "link", "set", "eth0", "up"', '"ip", "link", "set", "eth0", "address", "02:13:13:13:13:13"'
).replace('"-t", "20"', '"-t", "2"')

_FORGERY = r"""
import json, socket, struct, time
told = json.loads(%r)

def mac(text): return bytes.fromhex(text.replace(":", ""))
def four(text): return socket.inet_pton(socket.AF_INET, text)
def six(text): return socket.inet_pton(socket.AF_INET6, text)
def total(data):
    data += b"\0" * (len(data) %% 2)
    value = sum(struct.unpack("!%%dH" %% (len(data) // 2), data))
    while value >> 16: value = (value & 0xFFFF) + (value >> 16)
    return ~value & 0xFFFF

ME, OTHER = mac(told["mac"]), mac(told["other_mac"])
ALL, STRANGE = b"\xff" * 6, b"\x02\x13\x13\x13\x13\x13"
IP, OTHER_IP, GATEWAY = told["ip"], told["other_ip"], told["gateway"]
SIX, LOCAL, OTHER_SIX, GATEWAY6 = told["six"], told["local"], told["other_six"], told["gateway6"]

def eth(target, source, kind, body): return target + source + struct.pack("!H", kind) + body
def ip(source, target, protocol, body):
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), 7, 0, 64, protocol, 0, four(source), four(target))
    return head[:10] + struct.pack("!H", total(head)) + head[12:] + body
def udp(sport, dport, mark): return struct.pack("!HHHH", sport, dport, 8 + len(mark), 0) + mark
def ip6(source, target, protocol, body, hops=255):
    return struct.pack("!IHBB16s16s", 6 << 28, len(body), protocol, hops, six(source), six(target)) + body
def checked(source, target, body):  # ICMPv6 and UDP need a checksum; it stands at 2 in the one, at 6 in the other
    return total(six(source) + six(target) + struct.pack("!II", len(body), 58) + body)
def icmp6(source, target, kind, rest, mark, hops=255):
    body = struct.pack("!BBH", kind, 0, 0) + rest
    option = b"\xfd" + bytes([(2 + len(mark) + 7) // 8]) + mark
    body += option + b"\0" * (-len(option) %% 8)
    body = body[:2] + struct.pack("!H", checked(source, target, body)) + body[4:]
    return ip6(source, target, 58, body, hops)
def udp6(source, target, sport, dport, mark):
    body = udp(sport, dport, mark)
    value = total(six(source) + six(target) + struct.pack("!II", len(body), 17) + body)
    return ip6(source, target, 17, body[:6] + struct.pack("!H", value) + body[8:])
def arp(operation, source, sender, target, mark):
    return struct.pack("!HHBBH6s4s6s4s", 1, 0x800, 6, 4, operation, source, four(sender), b"\0" * 6, four(target)) + mark
def multicast6(target): return b"\x33\x33" + six(target)[-4:]

def solicit(source, target, mark):
    group = "ff02::1:ff%%02x:%%02x%%02x" %% tuple(six(target)[-3:])
    return eth(multicast6(group), ME, 0x86DD, icmp6(source, group, 135, b"\0" * 4 + six(target), mark))
def advert(source, target, mark, link=ME):
    rest = struct.pack("!I", 0xA0000000) + six(target) + b"\2\1" + link
    return eth(multicast6("ff02::1"), ME, 0x86DD, icmp6(source, "ff02::1", 136, rest, mark))
ROUTER = struct.pack("!BBHII", 64, 0, 1800, 0, 0)
def router(source, mark): return icmp6(source, "ff02::1", 134, ROUTER, mark)
def wrapped(packet, kind, head):  # puts an extension header in front of the ICMPv6 message
    return packet[:4] + struct.pack("!HB", len(packet) - 40 + len(head), kind) + packet[7:40] + head + packet[40:]

# Who is asked for first is the gateway, or the other guest: its MAC is learned from the kernel.
def neighbour(address):
    for _ in range(600):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock: sock.sendto(b"x", (address, 9))
        for line in open("/proc/net/arp").read().splitlines()[1:]:
            words = line.split()
            if words[0] == address and words[2] != "0x0": return mac(words[3])
        time.sleep(0.1)
    return ALL
NEXT = neighbour(GATEWAY)

FRAMES = {
    "honest-arp": lambda m: eth(ALL, ME, 0x806, arp(1, ME, IP, GATEWAY, m)),
    "honest-udp": lambda m: eth(NEXT, ME, 0x800, ip(IP, GATEWAY, 17, udp(9, 9, m))),
    "honest-udp6": lambda m: eth(NEXT, ME, 0x86DD, udp6(SIX, GATEWAY6, 9, 9, m)),
    "honest-solicit": lambda m: solicit(SIX, GATEWAY6, m),
    "honest-advert": lambda m: advert(SIX, SIX, m),
    "mac-strange": lambda m: eth(NEXT, STRANGE, 0x800, ip(IP, GATEWAY, 17, udp(9, 9, m))),
    "mac-of-other": lambda m: eth(NEXT, OTHER, 0x800, ip(IP, GATEWAY, 17, udp(9, 9, m))),
    "mac-of-other-whole": lambda m: eth(NEXT, OTHER, 0x800, ip(OTHER_IP, GATEWAY, 17, udp(9, 9, m))),
    "ip-of-other": lambda m: eth(NEXT, ME, 0x800, ip(OTHER_IP, GATEWAY, 17, udp(9, 9, m))),
    "ip-of-gateway": lambda m: eth(ALL, ME, 0x800, ip(GATEWAY, IP, 17, udp(9, 9, m))),
    "ip-strange": lambda m: eth(NEXT, ME, 0x800, ip("8.8.8.8", GATEWAY, 17, udp(9, 9, m))),
    "ip-zero": lambda m: eth(ALL, ME, 0x800, ip("0.0.0.0", "255.255.255.255", 17, udp(9, 9, m))),
    "ip-to-loopback": lambda m: eth(NEXT, ME, 0x800, ip(IP, "127.0.0.1", 17, udp(9, 9, m))),
    "ip-to-metadata": lambda m: eth(NEXT, ME, 0x800, ip(IP, "169.254.169.254", 17, udp(9, 80, m))),
    "broadcast": lambda m: eth(ALL, ME, 0x800, ip(IP, "255.255.255.255", 17, udp(9, 9, m))),
    "multicast": lambda m: eth(b"\1\0\x5e\0\0\xfb", ME, 0x800, ip(IP, "224.0.0.251", 17, udp(5353, 5353, m))),
    "multicast6": lambda m: eth(multicast6("ff02::fb"), ME, 0x86DD, udp6(LOCAL, "ff02::fb", 5353, 5353, m)),
    "six-of-other": lambda m: eth(NEXT, ME, 0x86DD, udp6(OTHER_SIX, GATEWAY6, 9, 9, m)),
    "six-strange": lambda m: eth(NEXT, ME, 0x86DD, udp6("2a00:99::1", GATEWAY6, 9, 9, m)),
    "six-strange-local": lambda m: eth(NEXT, ME, 0x86DD, udp6("fe80::bad", GATEWAY6, 9, 9, m)),
    "arp-claims-gateway": lambda m: eth(ALL, ME, 0x806, arp(2, ME, GATEWAY, IP, m)),
    "arp-claims-other": lambda m: eth(ALL, ME, 0x806, arp(1, ME, OTHER_IP, OTHER_IP, m)),
    "arp-gives-strange-mac": lambda m: eth(ALL, ME, 0x806, arp(2, STRANGE, IP, GATEWAY, m)),
    "arp-from-strange-mac": lambda m: eth(ALL, STRANGE, 0x806, arp(2, STRANGE, IP, GATEWAY, m)),
    "rarp": lambda m: eth(ALL, ME, 0x8035, arp(3, ME, IP, IP, m)),
    "advert-of-gateway": lambda m: advert(SIX, GATEWAY6, m),
    "advert-of-other": lambda m: advert(SIX, OTHER_SIX, m),
    "advert-as-other": lambda m: advert(OTHER_SIX, OTHER_SIX, m),
    "router-advert": lambda m: eth(multicast6("ff02::1"), ME, 0x86DD, router(LOCAL, m)),
    "router-advert-behind-options": lambda m: eth(
        multicast6("ff02::1"), ME, 0x86DD, wrapped(router(LOCAL, m), 0, b"\x3a\0\1\4\0\0\0\0")),
    "router-advert-as-fragment": lambda m: eth(
        multicast6("ff02::1"), ME, 0x86DD, wrapped(router(LOCAL, m), 44, b"\x3a\0\0\1\0\0\0\7")),
    "router-solicit": lambda m: eth(multicast6("ff02::2"), ME, 0x86DD, icmp6(LOCAL, "ff02::2", 133, b"\0" * 4, m)),
    "redirect": lambda m: eth(NEXT, ME, 0x86DD, icmp6(LOCAL, GATEWAY6, 137, b"\0" * 4 + six(GATEWAY6) * 2, m)),
    "dhcp-offer": lambda m: eth(ALL, ME, 0x800, ip(IP, "255.255.255.255", 17, udp(67, 68, m))),
    "dhcp-offer-unicast": lambda m: eth(NEXT, ME, 0x800, ip(IP, GATEWAY, 17, udp(67, 68, m))),
    "dhcp-offer-of-gateway": lambda m: eth(ALL, ME, 0x800, ip(GATEWAY, "255.255.255.255", 17, udp(67, 68, m))),
    "dhcp-discover": lambda m: eth(ALL, ME, 0x800, ip("0.0.0.0", "255.255.255.255", 17, udp(68, 67, m))),
    "dhcp6-reply": lambda m: eth(NEXT, ME, 0x86DD, udp6(SIX, GATEWAY6, 547, 546, m)),
    "vlan": lambda m: eth(NEXT, ME, 0x8100, b"\0\5\x08\0" + ip(IP, GATEWAY, 17, udp(9, 9, m))),
    "vlan-of-provider": lambda m: eth(NEXT, ME, 0x88A8, b"\0\5\x08\0" + ip(IP, GATEWAY, 17, udp(9, 9, m))),
    "spanning-tree": lambda m: mac("0180c2000000") + ME + struct.pack("!H", 38) + b"\x42\x42\3\0\0\0\0" + m,
    "lldp": lambda m: eth(mac("0180c200000e"), ME, 0x88CC, m),
    "pause": lambda m: eth(mac("0180c2000001"), ME, 0x8808, b"\0\1\xff\xff" + m),
    "strange-protocol": lambda m: eth(ALL, ME, 0x88B5, m),
}
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
    sock.bind(("eth0", 0))
    for name, frame in [*FRAMES.items(), *reversed(FRAMES.items())]:
        sock.send(frame(b"FORGED-%%s!" %% name.encode() + b"." * 40))
        time.sleep(0.005)
print(json.dumps(list(FRAMES)))
"""


def forgery(told: dict[str, str]) -> str:
    """Return the program that sends honest and forged frames, each with its name in it, and prints their names."""
    return _FORGERY % json.dumps(told)
