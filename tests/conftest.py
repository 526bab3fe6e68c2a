"""Asynchronous tests are marked ``@pytest.mark.anyio``; the gateway runs on asyncio, so they do too."""

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
