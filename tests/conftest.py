"""Asynchronous tests need no mark (``anyio_mode``); the gateway runs on asyncio, so they do too."""

import pytest
from hypothesis import settings

from tests.support.gateway import scene, stage
from tests.support.jssdk import js

settings.register_profile("aibridge", deadline=None)  # no test asserts a time
settings.load_profile("aibridge")

__all__ = ["anyio_backend", "js", "scene", "stage"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
