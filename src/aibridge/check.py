"""``aibridge check``: what the configuration comes to, and whether the providers can be reached with it."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aibridge.config import Settings
from aibridge.errors import UpstreamError
from aibridge.providers import Provider
from aibridge.server import upstream_of
from aibridge.upstream import Upstream, UpstreamRequest

_UNAUTHORIZED = 401
_FORBIDDEN = 403
_SERVER_ERROR = 500


@dataclass(frozen=True, slots=True)
class Answer:
    """What a probe came to."""

    ok: bool
    text: str


def describe(settings: Settings) -> str:
    """The effective configuration as TOML, secrets masked."""
    return "\n".join(_tables(settings.model_dump(mode="json", exclude_none=True), ()))


def traces(settings: Settings) -> str:
    """Where traces go, or why there are none."""
    tracing = settings.tracing
    return tracing.destination or f"none are sent: {tracing.unused or 'there is no endpoint'}"


def _tables(tree: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    values = {key: value for key, value in tree.items() if not isinstance(value, dict)}
    if values:
        yield f"[{'.'.join(path)}]"
        yield from (f"{key} = {json.dumps(value)}" for key, value in values.items())
        yield ""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _tables(value, (*path, key))


async def probe(settings: Settings, seconds: float) -> list[tuple[Provider, Answer]]:
    """Ask each provider for its models, all at once. Each has `seconds` to answer."""
    providers = settings.enabled_providers()
    upstream = upstream_of(settings)
    try:
        answers = await asyncio.gather(*(_probe(upstream, provider, seconds) for provider in providers))
    finally:
        await upstream.aclose()
    return list(zip(providers, answers, strict=True))


async def _probe(upstream: Upstream, provider: Provider, seconds: float) -> Answer:
    url = provider.url("/v1/models", "")
    headers: list[tuple[bytes, bytes]] = [(b"accept", b"application/json")]
    key = (provider.api_key or "").encode()
    if provider.kind == "anthropic":
        headers.append((b"anthropic-version", b"2023-06-01"))
        headers += [(b"x-api-key", key)] if key else []
    elif key:
        headers.append((b"authorization", b"Bearer " + key))
    try:
        async with asyncio.timeout(seconds):
            response = await upstream.send(UpstreamRequest("GET", url, headers, ca_file=provider.ca_file))
            response.close()
    except TimeoutError:
        return Answer(ok=False, text=f"{url} did not answer within {seconds:g} seconds")
    except UpstreamError as error:
        return Answer(ok=False, text=f"{url}: {error.message}")
    status = response.head.status
    if status in (_UNAUTHORIZED, _FORBIDDEN):
        if provider.api_key is None:
            return Answer(ok=True, text=f"{url} answers; it wants a key, which clients have to bring")
        return Answer(ok=False, text=f"{url} refuses the configured api_key (HTTP {status})")
    if status >= _SERVER_ERROR:
        return Answer(ok=False, text=f"{url} answers with HTTP {status}")
    return Answer(ok=True, text=f"{url} answers with HTTP {status}")
