"""Passthrough requests about conversations with injected tools: they have to see what those see.

Token counts count the tools and what is hidden from the client. With server-side state the client knows a response by the id
of its first turn, the provider by that of its last (wire.md D5).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from aibridge.asgi import ClientConnection
from aibridge.injection import Injection
from aibridge.wire import WireFormat
from aibridge.wire.responses_turns import response_key, shown_items, shown_response, upstream_ids
from aibridge.wire.splicing import with_member

_COUNTS: Final = frozenset({"/v1/messages/count_tokens", "/v1/responses/input_tokens"})
_RESPONSES: Final = "/v1/responses/"


@dataclass(frozen=True, slots=True)
class Adapted:
    """How a request differs from what the client sent, and its response from what the provider sends.

    `path` is below the provider's name. `body` is None where the client's goes as it comes; `decoded` says that the content
    coding that it had is gone. `edit` is for the JSON body of a successful response. `also` are further paths that the same
    request goes to before; nobody sees their responses.
    """

    path: str
    body: bytes | None = None
    decoded: bool = False
    edit: Callable[[bytes], bytes] | None = None
    also: Sequence[str] = ()


async def adapt(
    injection: Injection, about: WireFormat, scope: str, client: ClientConnection, path: str, max_body_bytes: int
) -> Adapted:
    """What a request becomes. `about` is the format of the conversations that it is about, `scope` that of their history.

    Raises `BridgeError` for a body that is refused, `ClientDisconnected`.
    """
    if client.method == "POST" and path in _COUNTS:
        request = about.parse(await client.body(max_body_bytes), client.header(b"content-encoding"))
        prepared = await injection.prepare(request, scope)
        return Adapted(path, prepared.request.body, decoded=not prepared.request.coding)
    if not path.startswith(_RESPONSES):
        return Adapted(path)
    identity, slash, rest = path.removeprefix(_RESPONSES).partition("/")
    memory = await injection.recall_one(scope, response_key(identity))
    if memory is None:
        return Adapted(path)
    paths = [_RESPONSES + one + slash + rest for one in upstream_ids(memory)] or [path]
    if client.method == "DELETE":
        return Adapted(paths[-1], edit=partial(with_member, name="id", value=json.dumps(identity).encode()), also=paths[:-1])
    if rest == "input_items":
        return Adapted(paths[-1], edit=partial(shown_items, memory=memory))
    toolset = await injection.toolset_of(memory)
    return Adapted(paths[-1], edit=partial(shown_response, memory=memory, toolset=toolset))
