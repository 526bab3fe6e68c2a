"""Allow-listed routes that are reverse-proxied: nothing is kept, and nothing touched beyond what it is adapted by.

Without injected tools nothing is (`aibridge.sidecalls`).
"""

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial

from msgspec import structs

from aibridge.asgi import ClientConnection
from aibridge.calling import Caller, Purpose
from aibridge.errors import BridgeError, ClientDisconnected, UpstreamError
from aibridge.events import PassedThrough, notify
from aibridge.headers import to_client, to_upstream, without
from aibridge.interruptible import Interruptible
from aibridge.providers import Route
from aibridge.sidecalls import Adapted
from aibridge.upstream import Body, UpstreamRequest, UpstreamResponse
from aibridge.wire.base import Headers
from aibridge.wire.coding import CodingError, decode
from aibridge.wire.observer import MAX_BODY_BYTES
from aibridge.wire.reading import Unreadable


async def pass_through(
    client: ClientConnection,
    route: Route,
    adapted: Adapted,
    *,
    caller: Caller,
    max_body_bytes: int,
) -> None:
    """Serve one request. Raises `BridgeError` where nothing was sent yet. When the client goes, the provider is told."""
    waits = Interruptible()
    watches: list[Callable[[], object]] = []

    def watch() -> None:
        watches.append(client.when_gone(partial(waits.interrupt, ClientDisconnected())))

    async def upload() -> AsyncIterator[bytes]:
        async for piece in client.pieces(max_body_bytes):
            yield piece
        watch()  # only now: what comes before the end is the body

    body: Body
    if adapted.body is None and not adapted.also and _has_body(client):
        body = upload()
    else:  # what goes to several paths cannot be a stream, which is sent only once
        body = adapted.body or (await client.body(max_body_bytes) if adapted.also else b"")
        watch()
    provider, purpose, call = caller.provider, Purpose(route.pattern), None
    headers = to_upstream(client.headers, provider.kind, provider.api_key)
    fields = _fields(client, headers.fields, adapted, streamed=not isinstance(body, bytes))
    url = provider.url(adapted.path, client.query)
    request = UpstreamRequest(client.method, url, fields, body, provider.ca_file, headers.secrets)
    try:
        for path in adapted.also:
            also = structs.replace(request, url=provider.url(path, client.query))
            call = await waits.wait(caller.call(also, purpose))
            call.close()
        call = await waits.wait(caller.call(request, purpose))
        notify(caller.observers, PassedThrough(provider.name, route.pattern, client.method, call.response.head.status))
        await _relay(client, call.response, adapted, waits)
    except UpstreamError:
        if client.started:
            return  # leaving the response unfinished makes the server break the connection off
        if isinstance(client.upload_error, BridgeError):
            raise client.upload_error from None
        if client.upload_error is None:
            raise
    finally:
        for forget in watches:
            forget()
        if call is not None:
            call.close()


def _has_body(client: ClientConnection) -> bool:
    return bool(client.header(b"transfer-encoding")) or client.header(b"content-length") not in ("", "0")


def _fields(client: ClientConnection, fields: Headers, adapted: Adapted, *, streamed: bool) -> Headers:
    """The header fields for the provider."""
    if adapted.decoded:
        fields = without(fields, b"content-encoding")
    if adapted.edit is not None:
        fields = [*without(fields, b"accept-encoding"), (b"accept-encoding", b"identity")]
    return [*fields, *_declared_length(client)] if streamed else fields


async def _relay(client: ClientConnection, response: UpstreamResponse, adapted: Adapted, waits: Interruptible) -> None:
    head = response.head
    if adapted.edit is not None and head.ok and not head.is_stream(requested=False):
        await _respond_edited(client, response, adapted.edit, waits)
        return
    await client.respond(head.status, to_client(head.headers))
    while chunk := await waits.wait(response.read()):
        await waits.wait(client.relay(chunk))
    await client.finish()


async def _respond_edited(
    client: ClientConnection, response: UpstreamResponse, edit: Callable[[bytes], bytes], waits: Interruptible
) -> None:
    """Answer with an edited body; with the provider's own where that is nothing that can be edited."""
    pieces: list[bytes] = []
    size = 0
    while chunk := await waits.wait(response.read()):
        pieces.append(chunk)
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise UpstreamError("The provider's response is too large.")
    body = b"".join(pieces)
    headers = to_client(response.head.headers)
    with suppress(CodingError, Unreadable):
        body = edit(decode(response.head.coding, body))
        headers = without(without(headers, b"content-encoding"), b"content-length")
        headers.append((b"content-length", b"%d" % len(body)))
    await client.respond(response.head.status, headers)
    await waits.wait(client.relay(body))
    await client.finish()


def _declared_length(client: ClientConnection) -> Headers:
    """The length of the body; of a chunked one it is of no account, where a client sends both (RFC 9112 section 6.3)."""
    if client.header(b"transfer-encoding"):
        return []
    return [field for field in client.headers if field[0] == b"content-length"]
