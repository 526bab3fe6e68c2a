"""``aibridge replay``: the request of a traffic dump once more, to its provider or to any other server.

The credential in a dump is masked. In its place goes that of a variable, which the user names, or the configured one, but
that only to the server that it is for, or where the user says so.
"""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Final

from aibridge.config import Settings
from aibridge.dumpfiles import DumpedRequest
from aibridge.errors import UpstreamError
from aibridge.headers import CREDENTIAL_FIELDS, to_upstream
from aibridge.masking import is_credential
from aibridge.providers import Provider, check_base_url
from aibridge.server import upstream_of
from aibridge.upstream import UpstreamRequest
from aibridge.wire.base import Headers
from aibridge.wire.coding import CodingError, decoder
from aibridge.wire.observer import ResponseHead

ANSWERED_WELL: Final = 0
ANSWERED: Final = 1
"""With a status other than 2xx."""
NOT_SENT: Final = 2
NOT_ANSWERED: Final = 3
"""Or not to the end."""


class CannotReplay(Exception):
    """Nothing was sent. The message says why."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What is about to be sent. `notes` say what is not as it was."""

    request: UpstreamRequest
    credential: str
    notes: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """All of that, for people."""
        yield f"{self.request.method} {self.request.url}"
        yield f"credential: {self.credential}"
        yield from (f"note: {note}" for note in self.notes)


def planned(
    dump: DumpedRequest, settings: Settings, *, base_url: str | None, key_variable: str | None, send_api_key: bool
) -> Replay:
    """What to send: to `base_url`, or else to the provider as it is configured now. Raises `CannotReplay`.

    The credential is that of the environment variable `key_variable`; or else the provider's configured `api_key`, where the
    request goes to the provider's own base URL or `send_api_key` says that it may go elsewhere.
    """
    provider = next((provider for provider in settings.enabled_providers() if provider.name == dump.provider), None)
    target = base_url or (None if provider is None else provider.base_url)
    if target is None:
        raise CannotReplay(f"no provider {dump.provider!r} is configured; --base-url names a server to send the request to")
    try:
        check_base_url(target)
    except ValueError as error:
        raise CannotReplay(f"--base-url {error}") from None
    key, credential = _credential(provider, target, key_variable, send_api_key=send_api_key)
    fields = (
        [(name, value) for name, value in dump.headers if not is_credential(name)] if key is None else _with_key(dump, key)
    )
    own = provider is not None and _same(target, provider.base_url)
    request = UpstreamRequest(
        dump.method,
        target.rstrip("/") + dump.path,
        fields,
        _in_one_piece(dump.body) if dump.chunked else dump.body,
        provider.ca_file if provider is not None and own else None,
        () if key is None else (key,),
    )
    return Replay(request, credential, tuple(_notes(dump, target, fields)))


def _credential(
    provider: Provider | None, target: str, variable: str | None, *, send_api_key: bool
) -> tuple[str | None, str]:
    """The key to send, and what to say of it."""
    if variable is not None:
        key = os.environ.get(variable, "").strip()
        if not key or not key.isprintable():
            raise CannotReplay(f"the environment variable {variable} is not set, or is no key")
        return key, f"the one in {variable}"
    if provider is None or provider.api_key is None:
        return None, "none; --key-env names a variable that has one"
    if _same(target, provider.base_url):
        return provider.api_key, f"the api_key of provider {provider.name}"
    if send_api_key:
        return provider.api_key, f"the api_key of provider {provider.name}, though this is another server, as you say"
    return None, f"none: this is not the server of provider {provider.name}; --key-env or --send-api-key gives it one"


def _same(url: str, other: str) -> bool:
    return url.rstrip("/") == other.rstrip("/")


def _with_key(dump: DumpedRequest, key: str) -> Headers:
    """The header fields with a key where one was, in the same form; at the end where none was."""
    fields: list[tuple[bytes, bytes]] = []
    for name, value in dump.headers:
        if name in CREDENTIAL_FIELDS:
            scheme, space, _ = value.partition(b" ")
            fields.append((name, scheme + space + key.encode() if space else key.encode()))
        elif not is_credential(name):
            fields.append((name, value))
    if all(name not in CREDENTIAL_FIELDS for name, _ in fields):
        fields.append(to_upstream(fields, dump.kind, key).fields[-1])
    return fields


def _notes(dump: DumpedRequest, target: str, sent: Headers) -> Iterator[str]:
    if not _same(target, dump.base_url):
        yield f"it was sent to {dump.base_url}"
    names = {name.decode("latin-1") for name, _ in sent}
    for name in dump.masked:
        if name.startswith("?") or (name in names and name.encode() not in CREDENTIAL_FIELDS):
            yield f"{name} held a credential, and goes out masked"
        elif name not in names and name.encode() not in CREDENTIAL_FIELDS:
            yield f"the header field {name} held a credential, and is left out"
    if dump.body_masked:
        yield "a part of the body was a credential, and goes out masked"


async def _in_one_piece(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def replayed(
    replay: Replay, settings: Settings, write: Callable[[bytes], object], complain: Callable[[str], object]
) -> int:
    """Send it, and `write` the response as it comes, its body decoded. Answers with the exit status."""
    upstream = upstream_of(settings)
    try:
        response = await upstream.send(replay.request)
        write(_written(response.head))
        decoding = decoder(response.head.coding)
        while piece := await response.read():
            for decoded in decoding.feed(piece):
                write(decoded)
    except UpstreamError as error:
        complain(error.message)
        return NOT_ANSWERED
    except CodingError:
        complain("The response's body cannot be decoded.")
        return NOT_ANSWERED
    finally:
        await upstream.aclose()
    return ANSWERED_WELL if response.head.ok else ANSWERED


def _written(head: ResponseHead) -> bytes:
    lines = [b"HTTP/1.1 %d" % head.status, *(b"%b: %b" % field for field in head.headers), b"", b""]
    return b"\n".join(lines)
