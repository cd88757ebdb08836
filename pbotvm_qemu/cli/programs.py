"""Commands that run a program: `exec` here, `client` through a relay."""

from __future__ import annotations

import sys
from typing import Annotated, Optional

import typer

from pbotvm_qemu.cli.base import (
    Json,
    Transport,
    app,
    complete_language,
    complete_machine,
    config_for,
    print_json,
    say,
    until_done,
)
from pbotvm_qemu.errors import StateError, UsageError


@app.command(name="exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def execute(
    code: Annotated[
        list[str] | None,
        typer.Argument(help="The program; words are joined by blanks. - reads it from --file or stdin."),
    ] = None,
    *,
    vm: Annotated[Optional[str], typer.Option("--vm", help="The machine.", autocompletion=complete_machine)] = None,
    lang: Annotated[str, typer.Option("--lang", help="The language.", autocompletion=complete_language)] = "sh",
    args: Annotated[
        str | None, typer.Option("--args", "--arguments", help="Arguments of the program, in one string.")
    ] = None,
    stdin: Annotated[Optional[str], typer.Option("--stdin", help="Text for standard input, instead of ours.")] = None,
    file: Annotated[Optional[str], typer.Option("--file", help="Read the program from this file.")] = None,
    put: Annotated[list[str] | None, typer.Option("--put", help="PATH[:NAME]: put a file beside the program.")] = None,
    get: Annotated[
        list[str] | None, typer.Option("--get", help="NAME[:PATH]: fetch a file that the program wrote.")
    ] = None,
    timeout: Annotated[Optional[float], typer.Option(help="Seconds that the program may take.")] = None,
    output_limit: Annotated[Optional[str], typer.Option(help="Most bytes that it may print, such as 64M.")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Open a session for it, and say on stderr how to go on in it.")
    ] = False,
    session: Annotated[Optional[str], typer.Option("--session", help="Run it in this session.")] = None,
    transport: Transport = None,
    as_json: Json = False,
) -> None:
    """Run a program on a clean machine; its output and exit status become ours."""
    from pbotvm_qemu import control, execution, running

    config = config_for(vm, limits_wall=timeout, limits_output=output_limit, pool_transport=transport)
    job = execution.prepare(
        code or [], lang=lang, vm=vm, args=args, stdin=stdin, file=file, put=put or [], get=get or []
    )
    if job.request.info:
        typer.echo(execution.info(job.request, config.machine.name))
        return
    if keep and session is not None:
        raise UsageError("--keep opens a session, --session uses one", hint="give one of them")
    if keep:
        session = str(until_done(control.ask(config.machine.name, {"do": "session-open"}))["id"])
        say(f"session {session} is open; go on with: pbotvm-qemu exec --session {session}")
    sink = execution.Sink(keep=as_json)
    result = until_done(
        running.execute(
            config,
            job.request,
            on_output=sink.write,
            stdin=job.stdin(),
            code=job.code,
            files=job.files,
            collect=[name for name, _path in job.collect],
            session=session,
            on_wait=say,
        )
    )
    outcome = result.outcome
    job.store(outcome)
    if as_json:
        print_json(execution.report(result.language, outcome, sink) | {"session": session})
    else:
        for line in execution.remarks(outcome, config.limits):
            say(line)
    if transport not in (None, "auto", outcome.transport):
        say(f"pbotvm-qemu: the guest was reached over {outcome.transport}; a kept machine has what it was started with")
    raise typer.Exit(outcome.exit_code)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def client(words: Annotated[list[str], typer.Argument(help="A JSON object or the words of a request.")]) -> None:
    """Send one request to the relay, as PBot's vm-client does, and print the answer."""
    from pbotvm_qemu import execution

    relay = config_for().relay
    line = execution.with_token(" ".join(words), relay.token)
    try:
        sys.stdout.buffer.write(until_done(execution.ask_relay(relay.host, relay.port, line)))
    except StateError as exc:  # the words of PBot's vm-client, where a bot looks for them
        typer.echo(str(exc))
        raise
