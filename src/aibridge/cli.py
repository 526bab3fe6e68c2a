"""The command line: ``aibridge serve``, ``check``, ``demo``, ``replay`` and ``mcp``."""

import asyncio
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from aibridge import __version__
from aibridge.config import DEFAULT_FILE, ConfigurationError, Settings, load
from aibridge.systemd import UnusableSocket, address_of, handed_over

_config = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Configuration file. Without it, aibridge.toml in this folder where there is one.",
)


def _load(config: Path | None, **server: Any) -> Settings:
    try:
        return load(config, server=server)
    except ConfigurationError as error:
        raise click.ClickException(f"the configuration cannot be used:\n{error}") from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """A gateway between AI clients and AI providers that relays faithfully and keeps an honest ledger."""


@main.command()
@_config
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on.  [default: 8080]")
@click.option("--workers", type=int, help="Processes that serve, such as one for each core.  [default: 1]")
def serve(config: Path | None, host: str | None, port: int | None, workers: int | None) -> None:
    """Run the gateway. SIGTERM lets responses end, SIGHUP has the configuration read anew."""
    given = {key: value for key, value in (("host", host), ("port", port), ("workers", workers)) if value is not None}
    try:
        inherited = handed_over()
    except UnusableSocket as error:
        raise click.ClickException(str(error)) from None
    given |= address_of(inherited)
    if config is None and DEFAULT_FILE.is_file():
        config = DEFAULT_FILE  # where it has gone, a reload must not take that for an empty one
    settings = _load(config, **given)
    from aibridge import process, supervisor  # noqa: PLC0415  the other commands do not need a server

    run = process.serve if settings.server.workers == 1 else supervisor.serve
    run(settings, partial(load, config, server=given), inherited)


@main.command()
@_config
@click.option("--timeout", type=float, default=10.0, show_default=True, help="Seconds to wait for each provider.")
def check(config: Path | None, timeout: float) -> None:
    """Print the effective configuration, and see whether each provider answers."""
    settings = _load(config)
    from aibridge.check import describe, probe, traces  # noqa: PLC0415

    click.echo(describe(settings))
    click.echo(f"traces: {traces(settings)}\n")
    problems = 0
    for provider, answer in asyncio.run(probe(settings, timeout)):
        problems += not answer.ok
        click.echo(f"{'ok  ' if answer.ok else 'FAIL'} {provider.name}: {answer.text}")
    sys.exit(1 if problems else 0)


@main.command()
@click.option(
    "--database", type=click.Path(path_type=Path, dir_okay=False), help="Keep the ledger in this file.  [default: none]"
)
def demo(database: Path | None) -> None:
    """Play a short conversation through the gateway, with a scripted provider, and print the ledger. Needs no keys."""
    from aibridge.demo import play  # noqa: PLC0415

    for line in asyncio.run(play(database)):
        click.echo(line)


@main.command()
@_config
@click.argument("dump", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--base-url", help="Send it to this server instead of the provider's, as a client would set it.")
@click.option("--key-env", metavar="VARIABLE", help="Environment variable with the key to send.")
@click.option("--send-api-key", is_flag=True, help="Send the provider's configured key to --base-url, too.")
def replay(config: Path | None, dump: Path, base_url: str | None, key_env: str | None, *, send_api_key: bool) -> None:
    """Send the request of a traffic DUMP again, and print the response as it comes.

    The key is that of --key-env, or the one configured for the provider, which is sent to its own server only. Exits with
    0 for a response of status 2xx, 1 for another one, 2 where nothing was sent, 3 where none came, or not to its end.
    """
    settings = _load(config)
    from aibridge.dumpfiles import Unusable, read_request  # noqa: PLC0415
    from aibridge.replay import NOT_SENT, CannotReplay, planned, replayed  # noqa: PLC0415

    try:
        request = read_request(dump)
        plan = planned(request, settings, base_url=base_url, key_variable=key_env, send_api_key=send_api_key)
    except (Unusable, CannotReplay, OSError) as error:
        click.echo(f"{dump} cannot be sent again: {error}", err=True)
        sys.exit(NOT_SENT)
    for line in plan.lines():
        click.echo(line, err=True)

    def write(data: bytes) -> None:
        click.echo(data, nl=False)

    sys.exit(asyncio.run(replayed(plan, settings, write, lambda message: click.echo(message, err=True))))


@main.group()
def mcp() -> None:
    """Look at the MCP servers whose tools are injected, and try them."""
    for talkative in ("aibridge", "mcp"):  # what is wrong with a server is printed
        logging.getLogger(talkative).addHandler(logging.NullHandler())


@mcp.command("list")
@_config
@click.option("-v", "--verbose", is_flag=True, help="With the descriptions and the schemas that models get.")
def list_tools(config: Path | None, *, verbose: bool) -> None:
    """List the servers, their state and their tools, and why some are left out."""
    settings = _load(config)
    from aibridge.tooling import listed  # noqa: PLC0415

    lines, complete = asyncio.run(listed(settings, verbose=verbose))
    click.echo("\n".join(lines))
    sys.exit(0 if complete else 1)


@mcp.command("call")
@_config
@click.argument("server")
@click.argument("tool")
@click.argument("arguments", metavar="JSON", default="{}")
def call_tool(config: Path | None, server: str, tool: str, arguments: str) -> None:
    """Call TOOL of SERVER with the arguments in JSON, as the gateway would, and print what comes of it."""
    settings = _load(config)
    from aibridge.tooling import NoSuchTool, called, said  # noqa: PLC0415

    try:
        outcome = asyncio.run(called(settings, server, tool, arguments))
    except NoSuchTool as error:
        raise click.ClickException(f"no such tool is offered:\n{error}") from None
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="JSON") from None
    click.echo(said(outcome))
    sys.exit(1 if outcome.is_error else 0)


@mcp.command("approve")
@_config
@click.argument("server")
@click.argument("tool", required=False)
def approve_tools(config: Path | None, server: str, tool: str | None) -> None:
    """Approve the definitions that the tools of SERVER have now, or only TOOL's."""
    settings = _load(config)
    from aibridge.tooling import NoSuchTool, approved  # noqa: PLC0415

    try:
        names = asyncio.run(approved(settings, server, tool))
    except NoSuchTool as error:
        raise click.ClickException(f"nothing to approve:\n{error}") from None
    click.echo("approved: " + ", ".join(names))
