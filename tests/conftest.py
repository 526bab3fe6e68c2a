"""Asynchronous tests need no mark (``anyio_mode``); the gateway runs on asyncio, so they do too."""

import sys
from types import AsyncGeneratorType

import pytest
from hypothesis import settings

from tests.support.gateway import scene, stage
from tests.support.jssdk import js

settings.register_profile("aibridge", deadline=None)  # no test asserts a time
settings.load_profile("aibridge")

__all__ = ["anyio_backend", "js", "scene", "stage"]


@pytest.hookimpl(trylast=True)  # behind pytest's own hook, which makes failures of these
def pytest_configure() -> None:
    """Have Python's garbage collector forgiven one thing, which it does to streams that the vendors' SDKs leave behind.

    Of two such generators, one reading the other, it may find both in a thread that is not the event loop's (a provider's in
    these tests). It hands the first to its event loop, which begins at once to close both, and then ends the second itself,
    in the middle of that. So it is with CPython 3.11 to 3.13; nobody is harmed.
    """
    tell = sys.unraisablehook

    def told(found: "sys.UnraisableHookArgs") -> None:
        is_this = str(found.exc_value) == "async generator already executing"
        if not (is_this and isinstance(found.object, AsyncGeneratorType)):
            tell(found)

    sys.unraisablehook = told


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
