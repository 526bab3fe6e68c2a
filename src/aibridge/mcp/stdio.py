"""MCP over the standard streams of a command, as a transport for the SDK.

The SDK's own would do but for this: it reads lines of any length, leaves the children of a command that has died behind,
and does not say how it died.
"""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from mcp.client.stdio import get_default_environment
from mcp.shared.message import SessionMessage
from mcp_types import jsonrpc_message_adapter

# How long a command may take to go after its input has ended, and then after SIGTERM (MCP 2025-11-25, lifecycle, shutdown).
_GRACE_SECONDS: Final = 2.0
_POLL_SECONDS: Final = 0.01

_MAX_SAID: Final = 500  # characters of a line on standard error

Messages = MemoryObjectReceiveStream[SessionMessage | Exception]
"""What the server sends."""


@asynccontextmanager
async def stdio_client(
    command: Sequence[str], env: Mapping[str, str], limit: int, lost: Callable[[str], None], said: Callable[[str], None]
) -> AsyncGenerator[tuple[Messages, MemoryObjectSendStream[SessionMessage]]]:
    """Run a command for as long as the context lasts, in a process group of its own, with a minimal environment and `env`.

    `limit` is the size of the longest message, in bytes. `said` gets the lines of its standard error, cut to a length.
    Raises OSError where it cannot be started.
    """
    loop = asyncio.get_running_loop()
    # As `asyncio.create_subprocess_exec` does, which does not give us the transport to close.
    transport, protocol = await loop.subprocess_exec(
        lambda: asyncio.subprocess.SubprocessStreamProtocol(limit, loop),
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=get_default_environment() | dict(env),
        start_new_session=True,
    )
    process = asyncio.subprocess.Process(transport, protocol, loop)
    # No wait before the process is under the protection of `finally`.
    send, messages = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    outgoing, receive = anyio.create_memory_object_stream[SessionMessage](0)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_read, process, send, lost)
            tasks.start_soon(_write, process, receive)
            tasks.start_soon(_listen, process, said)
            try:
                yield messages, outgoing
            finally:
                with anyio.CancelScope(shield=True):
                    await _stop(process)
                tasks.cancel_scope.cancel()
    finally:
        transport.close()  # a pipe that nobody has read to its end stays open otherwise
        for stream in (send, messages, outgoing, receive):
            stream.close()


async def _read(
    process: asyncio.subprocess.Process,
    send: MemoryObjectSendStream[SessionMessage | Exception],
    lost: Callable[[str], None],
) -> None:
    """Read messages until the output ends. What is none is skipped: some servers print there."""
    assert process.stdout is not None  # noqa: S101  it was started with pipes
    reason = "its output has ended"
    with send:
        try:
            while line := await process.stdout.readline():
                try:
                    message = jsonrpc_message_adapter.validate_json(line, by_name=False)
                except ValueError:
                    continue
                await send.send(SessionMessage(message))
        except ValueError:  # of `readline`
            reason = "it has sent a message that is too large"
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return  # nobody reads any more
        with anyio.move_on_after(_GRACE_SECONDS):
            await _ended(process)
        status = process.returncode
        if status is not None:
            reason = f"it has exited with status {status}" if status >= 0 else f"it was ended by signal {-status}"
        lost(reason)  # before the session notices that its messages have ended, and fails calls


async def _write(process: asyncio.subprocess.Process, receive: MemoryObjectReceiveStream[SessionMessage]) -> None:
    assert process.stdin is not None  # noqa: S101  it was started with pipes
    # A process that is gone does not read; `_read` notices, too. On a closed pipe uvloop raises RuntimeError.
    with receive, suppress(OSError, RuntimeError):
        async for message in receive:
            process.stdin.write(message.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n")
            await process.stdin.drain()


async def _listen(process: asyncio.subprocess.Process, said: Callable[[str], None]) -> None:
    assert process.stderr is not None  # noqa: S101  it was started with pipes
    rest = b""
    while chunk := await process.stderr.read(65_536):
        *lines, rest = (rest + chunk).split(b"\n")
        rest = rest[: 4 * _MAX_SAID]
        for line in lines:
            said(line.decode(errors="replace").strip()[:_MAX_SAID])


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End the process, and whatever it has left running in its group."""
    assert process.stdin is not None  # noqa: S101  it was started with pipes
    process.stdin.close()
    with anyio.move_on_after(_GRACE_SECONDS):
        await _ended(process)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
        with anyio.move_on_after(_GRACE_SECONDS):
            while True:
                os.killpg(process.pid, 0)
                await anyio.sleep(_POLL_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    with anyio.move_on_after(_GRACE_SECONDS):
        await _ended(process)


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Not `process.wait`, which also waits for pipes that a child may hold open."""
    while process.returncode is None:  # noqa: ASYNC110  asyncio tells nobody else
        await anyio.sleep(_POLL_SECONDS)
