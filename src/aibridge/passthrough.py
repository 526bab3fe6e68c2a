"""Allow-listed routes that are reverse-proxied untouched: nothing is read, nothing is kept."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from aibridge.asgi import ClientConnection
from aibridge.errors import BridgeError, ClientDisconnected, UpstreamError
from aibridge.headers import to_client, to_upstream
from aibridge.interruptible import Interruptible
from aibridge.ledger import Observer, PassedThrough, notify
from aibridge.providers import Provider, Route
from aibridge.upstream import Body, Upstream, UpstreamRequest
from aibridge.wire.base import Headers


async def pass_through(
    client: ClientConnection,
    provider: Provider,
    route: Route,
    path: str,
    *,
    upstream: Upstream,
    observers: Sequence[Observer],
    max_body_bytes: int,
) -> None:
    """Serve one request. Raises `BridgeError` where nothing was sent yet. When the client goes, the provider is told."""
    waits = Interruptible()
    watches: list[asyncio.Task[None]] = []

    async def watch() -> None:
        await client.gone()
        waits.interrupt(ClientDisconnected())

    async def upload() -> AsyncIterator[bytes]:
        async for piece in client.pieces(max_body_bytes):
            yield piece
        watches.append(asyncio.create_task(watch()))  # only now: what comes before the end is the body

    headers = to_upstream(client.headers, provider.kind, provider.api_key).fields
    body: Body = b""
    if client.header(b"transfer-encoding") or client.header(b"content-length") not in ("", "0"):
        body = upload()
        headers += _declared_length(client)
    else:
        watches.append(asyncio.create_task(watch()))
    request = UpstreamRequest(client.method, provider.url(path, client.query), headers, body, provider.ca_file)
    response = None
    try:
        response = await waits.wait(upstream.send(request))
        notify(observers, PassedThrough(provider.name, route.pattern, client.method, response.head.status))
        await client.respond(response.head.status, to_client(response.head.headers))
        while chunk := await waits.wait(response.read()):
            await waits.wait(client.relay(chunk))
        await client.finish()
    except UpstreamError:
        if client.started:
            return  # leaving the response unfinished makes the server break the connection off
        if isinstance(client.upload_error, BridgeError):
            raise client.upload_error from None
        if client.upload_error is None:
            raise
    finally:
        for task in watches:
            task.cancel()
        if response is not None:
            response.close()


def _declared_length(client: ClientConnection) -> Headers:
    """The length of the body; of a chunked one it is of no account, where a client sends both (RFC 9112 section 6.3)."""
    if client.header(b"transfer-encoding"):
        return []
    return [field for field in client.headers if field[0] == b"content-length"]
