"""Asynchronous tests need no mark (``anyio_mode``); the gateway runs on asyncio, so they do too."""

import pytest

from tests.support.gateway import scene, stage
from tests.support.jssdk import js

__all__ = ["anyio_backend", "js", "scene", "stage"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
