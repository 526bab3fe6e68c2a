"""The vendors' own Python SDKs as clients of the gateway, without retries, in a scene of its stage."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import anthropic
import openai

from .gateway import Scene

ANTHROPIC_KEY: Final = "sk-ant-api03-of-the-sdk-4c1b"
OPENAI_KEY: Final = "sk-proj-of-the-sdk-77d0"

# Loading the authorities' certificates takes a client longer than all the rest of a test, and loopback needs none.
NO_CERTIFICATES: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@asynccontextmanager
async def anthropic_client(scene: Scene, provider: str = "anthropic") -> AsyncIterator[anthropic.AsyncAnthropic]:
    """Anthropic's SDK, set up as its users would: a base URL and a key."""
    async with anthropic.AsyncAnthropic(
        base_url=f"{scene.gateway.url}/{provider}",
        api_key=ANTHROPIC_KEY,
        max_retries=0,
        default_headers=scene.headers,
        http_client=anthropic.DefaultAsyncHttpxClient(verify=NO_CERTIFICATES),
    ) as client:
        yield client


@asynccontextmanager
async def openai_client(scene: Scene, provider: str = "openai") -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's SDK, set up as its users would: a base URL and a key."""
    async with openai.AsyncOpenAI(
        base_url=f"{scene.gateway.url}/{provider}/v1",
        api_key=OPENAI_KEY,
        max_retries=0,
        default_headers=scene.headers,
        http_client=openai.DefaultAsyncHttpxClient(verify=NO_CERTIFICATES),
    ) as client:
        yield client
