"""One request of a PBot client, from its line to the text of its answer.

Whatever goes wrong, the caller gets one of the predecessor's fixed replies, and the log says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pbotvm_qemu import control, editing, paste, paths, pbot_guest, process, reply, shelf, state
from pbotvm_qemu import request as requests
from pbotvm_qemu.errors import (
    GuestError,
    HostError,
    NeverRanError,
    PbotVMError,
    StateError,
    UnknownLanguageError,
    UsageError,
)
from pbotvm_qemu.guest import words
from pbotvm_qemu.guest.source import keep

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pbotvm_qemu.channel import OnOutput, Outcome, Stream
    from pbotvm_qemu.config import Config
    from pbotvm_qemu.endpoints import Endpoint
    from pbotvm_qemu.guest.spec import RunSpec
    from pbotvm_qemu.languages import Language, Registry
    from pbotvm_qemu.pool import Pool
    from pbotvm_qemu.runlog import RunLog, RunRecord

log = logging.getLogger(__name__)

DENIED = "Access denied: the request does not carry the token of this server."
NOT_UTF8 = "The request is not UTF-8."
_REVERT = 300.0  # seconds for an operator's command to put a machine back
_CALLER_MAX = 80  # characters
_EDITS_MAX = 16  # that wait for the one under way
# Without a language, the predecessor meant C in its newest form.
_DEFAULT_LANGUAGES = ("clang2x", "c2x", "c11", "sh")
# PBot's guest finds the code for a language by its module's name.
_GUEST_NAMES = {"c++": "cpp", "clang++": "clangpp"}


@dataclass(frozen=True, slots=True)
class Settings:
    """What may change while the relay runs."""

    config: Config
    registry: Registry


@dataclass(slots=True)
class _Reply:
    """Text for the caller, and what the operator learns."""

    text: str
    result: str
    revert: str = ""  # why a machine that is not ours must be put back


class Desk:
    """Answers requests for the machine that this process keeps, and for those that the configuration lists.

    `installed` are the languages of machine `name`; what channels ran last is kept in the folder `history`,
    what programs keep between runs in `kept`.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        name: str,
        installed: Sequence[str],
        pool: Pool,
        runs: RunLog,
        history: Path,
        kept: Path,
    ) -> None:
        self._settings = settings
        self._name = name
        self.installed = installed
        self._pool = pool
        self._runs = runs
        self._guests: dict[Endpoint, pbot_guest.PBotGuest] = {}
        self._last = reply.LastOutputs()
        self._history = history
        self._shelf = shelf.Shelf(kept)
        self._editing = asyncio.Lock()
        self.edits = 0  # edits that are under way or wait
        self.reverts = 0

    async def close(self) -> None:
        """Let go of the guests of others."""
        for guest in self._guests.values():
            await guest.close()
        self._guests.clear()

    async def configure(self, settings: Settings) -> None:
        """Use other languages and settings from the next request on; those under way are not disturbed."""
        self._settings = settings
        listed = set(settings.config.endpoints.machines.values())
        for endpoint in [known for known in self._guests if known not in listed]:
            await self._guests.pop(endpoint).close()

    async def answer(self, line: bytes, peer: str) -> str:
        """Return the text of the answer to one line. Never raises what a caller or a guest could cause."""
        settings = self._settings
        record = self._runs.begin("relay", caller=peer, machine=self._name)
        try:
            text = await self._answer(settings, line, record)
        except BaseException:
            record.result = "cancelled"
            raise
        finally:
            self._runs.end(record)
        return text

    async def _answer(self, settings: Settings, line: bytes, record: RunRecord) -> str:
        token = settings.config.relay.token
        try:
            base, code = requests.parse_context(line.decode("utf-8"), language=self._default_language(settings))
        except UnicodeDecodeError:
            record.result = "not-utf8"
            return NOT_UTF8
        except UsageError as exc:
            record.result = "usage"
            return str(exc)
        request, problem = base, ""
        try:
            code, request = requests.parse_choice(code, base)
        except UsageError as exc:
            problem = str(exc)
        if token and not any(_same(token, given) for given in (base.token, request.token)):
            record.result = "denied"
            return DENIED
        record.caller = f"{reply.printable(base.channel)}/{reply.printable(base.nick)}"[:_CALLER_MAX]
        if problem:
            record.result = "usage"
            return problem
        return await self._carry_out(settings, request, code, record)

    def _default_language(self, settings: Settings) -> str:
        chosen = settings.config.relay.language
        return chosen or next((name for name in _DEFAULT_LANGUAGES if name in self.installed), "sh")

    async def _carry_out(self, settings: Settings, request: requests.Request, code: str, record: RunRecord) -> str:
        machines = settings.config.endpoints
        name = machines.resolve(request.machine) if request.machine else self._name
        endpoint = machines.machines.get(name)
        if name != self._name and endpoint is None:
            record.result = "unknown-machine"
            return reply.unknown_machine(str(request.machine), machines.shown(self._name))
        record.machine = name
        foreign = name != self._name and endpoint is not None and endpoint.reachable and not state.running(name)
        try:
            language = settings.registry.find(request.language, self._languages(settings, name, foreign=foreign))
        except UnknownLanguageError as exc:
            record.result = "unknown-language"
            return f"{exc}\n{exc.hint}"
        record.language = language.name
        usage = request.usage or reply.USAGE
        try:
            edited = await self._edit(settings, request, code, language, usage)
            if edited.text is not None:
                record.result = "edit"
                return reply.clean(edited.text)
            request = requests.parse_options(edited.code or "", request)
        except NeverRanError as exc:
            record.result, record.detail = "never-ran", str(exc)
            return reply.UNAVAILABLE
        except UsageError as exc:
            record.result = "usage"
            return usage if "no code" in str(exc) else str(exc)
        if edited.paste:
            request = replace(request, paste=True)
        if request.info:
            record.result = "info"
            return requests.info(request, language)
        try:
            if foreign and endpoint is not None:
                answer = await self._run_foreign(settings, request, language, endpoint, record)
            else:
                answer = await self._run(settings, request, language, name, record)
        except UsageError as exc:
            answer = _Reply(str(exc), "usage")
        record.result = answer.result
        if request.paste and not answer.text.startswith(_FIXED):
            return await self._paste(settings, request, language, answer.text, record)
        if answer.text.startswith(_FIXED):
            return answer.text
        return self._last.shorten(answer.text, channel=request.channel, language=language.name, factoid=request.factoid)

    async def _edit(
        self, settings: Settings, request: requests.Request, code: str, language: Language, usage: str
    ) -> editing.Reply:
        """Return what an edit comes to: code to run, or a text. Code that is no edit is kept for the next one.

        A factoid's code is its author's: it is neither kept nor taken for an edit. Raises NeverRanError when too many
        edits wait already, UsageError for no code.
        """
        if not code.strip():
            raise UsageError("there is no code to run", hint="write the program after the options")
        if request.factoid or not settings.config.relay.editing:
            return editing.Reply(code=code)
        editor = editing.Editor(self._history, usage=usage)
        try:
            if not editing.is_edit(code):
                requests.parse_options(code, request)  # what cannot be run is not kept
                await asyncio.to_thread(editor.keep, request.channel, language.name, code)
                return editing.Reply(code=code)
            if self.edits > _EDITS_MAX:
                raise NeverRanError(f"{_EDITS_MAX} edits wait already", hint="try again later")
            self.edits += 1
            try:
                async with self._editing:  # one at a time, whatever expressions they hold
                    return await asyncio.to_thread(editor.handle, request.channel, language.name, code)
            finally:
                self.edits -= 1
        except HostError as exc:
            log.warning("%s", exc)
            return editing.Reply(text=reply.FATAL) if editing.is_edit(code) else editing.Reply(code=code)

    def _languages(self, settings: Settings, name: str, *, foreign: bool) -> Sequence[str]:
        if foreign:  # nobody knows what is installed there
            return sorted(settings.registry.languages)
        if name == self._name:
            return self.installed
        with contextlib.suppress(StateError):
            return state.load(name).languages
        return sorted(settings.registry.languages)

    async def _paste(
        self, settings: Settings, request: requests.Request, language: Language, text: str, record: RunRecord
    ) -> str:
        try:
            return await paste.put(
                settings.config.paste, paste.compose(request, requests.cmdline(request, language), text)
            )
        except HostError as exc:
            record.detail = f"paste: {exc}"
            log.warning("cannot paste: %s", exc)
            return f"error pasting: {exc}"

    # Machines of ours ------------------------------------------------------------------------------------------------

    async def _run(
        self, settings: Settings, request: requests.Request, language: Language, name: str, record: RunRecord
    ) -> _Reply:
        try:
            if request.persist_key is None:
                return await self._run_once(settings.config, request, language, name, record)
            async with self._shelf.item(request.persist_key, wait=settings.config.relay.queue_wait) as kept:
                return await self._run_once(settings.config, request, language, name, record, kept)
        except NeverRanError as exc:
            record.detail = str(exc)
            offline = isinstance(exc, pbot_guest.OfflineError) or (
                name == self._name and self._pool.status().get("problem")
            )
            return _Reply(reply.OFFLINE if offline else reply.UNAVAILABLE, "never-ran")
        except HostError as exc:
            record.detail = str(exc)
            return _Reply(reply.FATAL, "never-ran")

    async def _run_once(
        self,
        config: Config,
        request: requests.Request,
        language: Language,
        name: str,
        record: RunRecord,
        kept: shelf.Item | None = None,
    ) -> _Reply:
        output = bytearray()
        cut = False

        async def collect(_stream: Stream, data: bytes) -> None:
            nonlocal cut
            part = data[: config.relay.output - len(output)]
            cut = cut or len(part) < len(data)
            output.extend(part)

        if language.prepare in ("c", "c++"):  # where the predecessor resolves backslashes
            request = replace(request, arguments=words.split(request.argument_text, resolve=True))
        spec, content = requests.render(
            request,
            language,
            config.limits,
            stdin=request.stdin is not None,
            chat=True,
            kept=(request.persist_key or "") if kept else "",
            files=[(keep.ARCHIVE, kept.data)] if kept and kept.data else [],
            collect=[keep.ARCHIVE] if kept else [],
        )
        begin = time.monotonic()
        try:
            if name == self._name:
                feed = None if request.stdin is None else requests.once(_input(request))
                outcome = await self._pool.run(spec, content, on_output=collect, stdin=feed, caller=record.caller)
            else:
                outcome = await self._run_elsewhere(config, name, spec, content, collect, request)
        except (NeverRanError, UsageError):
            raise
        except PbotVMError as exc:
            record.detail = str(exc)
            if time.monotonic() - begin >= config.limits.wall:
                return _Reply(reply.timed_out(output.decode("utf-8", "replace")), "silent")
            return _Reply(reply.MISBEHAVING, "lost")
        record.queue_s, record.clone = outcome.queue_s, outcome.clone
        record.detail = outcome.message
        if kept and not outcome.timed_out and keep.ARCHIVE in outcome.files:
            record.detail = kept.store(outcome.files[keep.ARCHIVE]) or record.detail
        text = reply.text_of(outcome, bytes(output), factoid=request.factoid)
        if cut or outcome.truncated:
            text = f"{reply.trim(text)} [Output truncated]"
        return _Reply(text, outcome.limit or str(outcome.exit_code))

    async def _run_elsewhere(
        self,
        config: Config,
        name: str,
        spec: RunSpec,
        content: Sequence[bytes],
        collect: OnOutput,
        request: requests.Request,
    ) -> Outcome:
        """Run on another machine of ours, which a keeper of its own has."""
        try:
            talk = await control.connect(paths.MachinePaths(name).control_socket)
        except StateError as exc:
            raise pbot_guest.OfflineError(str(exc)) from exc
        try:
            feed = None if request.stdin is None else requests.once(_input(request))
            limit = spec.limits.wall + config.relay.queue_wait + 30
            return await talk.execute(spec, content, on_output=collect, stdin=feed, timeout=limit)
        finally:
            await talk.close()

    # Guests of others ------------------------------------------------------------------------------------------------

    async def _run_foreign(
        self,
        settings: Settings,
        request: requests.Request,
        language: Language,
        endpoint: Endpoint,
        record: RunRecord,
    ) -> _Reply:
        answer = await self._ask_foreign(settings.config, request, language, endpoint, record)
        if reply.trim(answer.text).endswith(reply.KILLED):
            answer.revert = "killed"
        if answer.revert and not settings.config.relay.no_revert:
            await self._revert(endpoint, answer.revert)
        return answer

    async def _ask_foreign(
        self, config: Config, request: requests.Request, language: Language, endpoint: Endpoint, record: RunRecord
    ) -> _Reply:
        guest = self._guests.get(endpoint)
        if guest is None:
            relay = config.relay
            guest = self._guests[endpoint] = pbot_guest.PBotGuest(
                endpoint, queue=relay.queue, queue_wait=relay.queue_wait, output=relay.output
            )
        try:
            await guest.check()
            text, record.queue_s = await guest.run(foreign_request(request, language), timeout=config.limits.wall)
        except pbot_guest.ResettingError as exc:
            record.detail = str(exc)
            return _Reply(reply.RESETTING, "resetting")
        except pbot_guest.OfflineError as exc:
            record.detail = str(exc)
            return _Reply(reply.OFFLINE, "offline")
        except NeverRanError as exc:
            record.detail = str(exc)
            return _Reply(reply.UNAVAILABLE, "never-ran")
        except TimeoutError:
            return _Reply(reply.TIMED_OUT, "wall", revert="timed-out")
        except GuestError as exc:
            record.detail = str(exc)
            return _Reply(reply.MISBEHAVING, "lost", revert="misbehaving")
        data = text.encode("utf-8", "replace")
        cut = len(data) > config.relay.output
        text = reply.clean(data[: config.relay.output].decode("utf-8", "ignore").removesuffix("\n"))
        return _Reply(f"{reply.trim(text)} [Output truncated]" if cut else text, "answered")

    async def _revert(self, endpoint: Endpoint, reason: str) -> None:
        """Put a guest of others back, with the operator's command."""
        if not endpoint.revert:
            log.warning("machine=%s cannot be reverted (%s): no revert command is configured", endpoint.name, reason)
            return
        begin = time.monotonic()
        self.reverts += 1
        try:
            (await process.run(endpoint.revert, timeout=_REVERT)).check()
        except PbotVMError as exc:
            log.error("revert machine=%s reason=%s failed: %s", endpoint.name, reason, exc)  # noqa: TRY400
        else:
            log.info("revert machine=%s reason=%s wall_s=%.3f", endpoint.name, reason, time.monotonic() - begin)


_FIXED = (
    reply.OFFLINE, reply.UNAVAILABLE, reply.MISBEHAVING, reply.RESETTING, reply.TIMED_OUT, reply.FATAL,
)  # fmt: skip


def foreign_request(request: requests.Request, language: Language) -> dict[str, object]:
    """Return the object that PBot's guest-server takes."""
    value: dict[str, object] = {
        "lang": _GUEST_NAMES.get(language.name, language.name),
        "sourcefile": language.source,
        "execfile": language.program or language.source,
        "cmdline": requests.cmdline(request, language),
        "input": request.stdin,
        "date": int(time.time()),
        "arguments": request.argument_text,
        "code": request.code + language.suffix,
    }
    if request.factoid:
        value["factoid"] = request.channel
    if request.persist_key is not None:
        value["persist-key"] = request.persist_key
    return value


def _input(request: requests.Request) -> bytes:
    """Return the program's input; as in the predecessor, it ends with a line feed of its own."""
    return (request.stdin or "").encode("utf-8", "surrogateescape") + b"\n"


def _same(token: str, given: str) -> bool:
    return hmac.compare_digest(token.encode(), given.encode("utf-8", "surrogateescape"))
