"""What guests talk to in the network tests: echo over TCP and UDP, and large transfers. Run as a program of its own.

Arguments: addresses to listen on, each ADDRESS,PORT. Prints `ready` when it listens everywhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import sys

BLOCK = bytes(range(256)) * 256


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve `echo TEXT`, `give N` (N bytes) and `take N` (answers with their SHA-256), a line each."""
    try:
        while line := await reader.readline():
            word, _, rest = line.decode().strip().partition(" ")
            if word == "give":
                left = int(rest)
                while left > 0:
                    writer.write(BLOCK[: min(left, len(BLOCK))])
                    await writer.drain()
                    left -= len(BLOCK)
            elif word == "take":
                digest, left = hashlib.sha256(), int(rest)
                while left > 0 and (data := await reader.read(min(left, 1 << 16))):
                    digest.update(data)
                    left -= len(data)
                writer.write(digest.hexdigest().encode() + b"\n")
            else:
                peer = writer.get_extra_info("peername")[0]
                writer.write(f"{rest} from {peer}\n".encode())
            await writer.drain()
    except (ConnectionError, ValueError):
        pass
    finally:
        writer.close()


class Echo(asyncio.DatagramProtocol):
    """Sends every datagram back."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        self.transport.sendto(data, address)  # type: ignore[attr-defined]


async def main() -> None:
    loop = asyncio.get_running_loop()
    for word in sys.argv[1:]:
        address, _, port = word.rpartition(",")
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        await asyncio.start_server(talk, address, int(port), family=family)
        sock = socket.socket(family, socket.SOCK_DGRAM)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setblocking(False)
        sock.bind((address, int(port)))
        await loop.create_datagram_endpoint(Echo, sock=sock)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
