"""What conversations are recognised by.

Truth: wire.md D3 (ids are opaque, may be empty or repeated on compatible servers), D6 (what clients replay). The ids are
those of real servers, as their documentation and the fixtures of their clients show them.
"""

import pytest
from hypothesis import given, strategies as st

from aibridge.wire.turns import Prefix, is_strong, key_of


@pytest.mark.parametrize(
    "identity",
    [
        "toolu_01A09q90qw90lq917835lq9",  # Anthropic
        "toolu_bdrk_013QFz8oAHuSkU9rRGNNzZw1",
        "msg_01XFDUDYJgAACzvnptvVoYEL",
        "call_DdmO9pD3xa9XTPNJ32zg2hcA",  # OpenAI
        "fc_68a1b2c3d4e5f60718293a4b5c6d7e8f",
        "rs_0a1b2c3d4e5f6071829304a5b6c7d8e9f0",
        "chatcmpl-tool-0a1b2c3d4e5f60718293a4b5c6d7e8f9",  # vLLM
        "call_0_550e8400-e29b-41d4-a716-446655440000",  # DeepSeek
        "D681PevKs",  # Mistral
        "function-call-13451234567890123456",  # Gemini
    ],
)
def test_ids_that_are_given_once(identity: str) -> None:
    assert is_strong(identity)


@pytest.mark.parametrize(
    "identity",
    [
        None,
        "",
        "0",
        "call_0",
        "call_10000",
        "call_0_get_time",
        "tool_0_bash",
        "functions.bash:0",  # Kimi
        "functions.k8s_get:0",
        "functions.mcp__context7__query:3",
        "functions.get_weather_v2:12",
        "bash",
        "get_current_weather",
    ],
)
def test_ids_that_are_counted(identity: str | None) -> None:
    assert not is_strong(identity)


@given(st.lists(st.text(max_size=5), max_size=4), st.lists(st.text(max_size=5), max_size=4))
def test_what_was_said_is_told_apart(one: list[str], other: list[str]) -> None:
    assert (Prefix().key(*one) == Prefix().key(*other)) is ([w.strip() for w in one] == [w.strip() for w in other])


def test_a_key_is_what_comes_after_what_was_said() -> None:
    prefix = Prefix()
    prefix.add("a ", "b")
    assert prefix.key("c") == Prefix().key("a", "b", " c") == prefix.key("c") != prefix.key("d")
    assert Prefix().key("\ud800")


def test_kinds_are_told_apart() -> None:
    assert key_of("id", "x") != key_of("signature", "x") != key_of("signature", "y")
    assert key_of("id", "\ud800")
