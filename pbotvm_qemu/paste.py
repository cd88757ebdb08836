"""Where `-paste` puts things: a folder of the operator's, or a program of his. Nothing leaves the host by itself."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pbotvm_qemu import process
from pbotvm_qemu.errors import HostError

if TYPE_CHECKING:
    from pbotvm_qemu.config import PasteConfig
    from pbotvm_qemu.request import Request

_TIMEOUT = 30.0  # seconds for the operator's program
_ANSWER_MAX = 400  # characters of what it prints


def compose(request: Request, cmdline: str, output: str) -> str:
    """Return the page: the code, what was done with it, and what came of it."""
    lines = [request.code, "", "/************* CMDLINE *************", cmdline]
    if request.arguments:
        lines.append(f"arguments: {' '.join(request.arguments)}")
    if request.stdin is not None:
        lines.append(f"stdin: {request.stdin}")
    lines += ["************** CMDLINE *************/", "", "/************* OUTPUT *************"]
    return "\n".join([*lines, output.rstrip("\n"), "************** OUTPUT *************/", ""])


async def put(config: PasteConfig, text: str) -> str:
    """Store `text` and return where it can be read.

    Raises HostError when the operator has named no place, or it does not take it.
    """
    data = text.encode("utf-8", "replace")
    if config.command:
        done = await process.run(config.command, timeout=_TIMEOUT, data=data)
        first = done.check().stdout.decode("utf-8", "replace").strip().split("\n", 1)[0][:_ANSWER_MAX]
        if not first:
            raise HostError("the paste program printed nothing")
        return first
    if not config.directory:
        raise HostError("no place is configured", hint="set directory or command in [paste] of config.toml")
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(6)}.txt"
    file = Path(config.directory) / name
    try:
        with file.open("xb") as stream:
            stream.write(data)
    except OSError as exc:
        raise HostError(f"cannot write {file}: {exc.strerror}", hint="check the folder in [paste]") from exc
    return f"{config.url}{name}" if config.url else str(file)
