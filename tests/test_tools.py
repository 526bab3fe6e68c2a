"""Injected tools: sets of them, and what came of calls.

Truth: wire.md A4 (unique names, stable order), A6 (the set of a conversation stays the same); clients.md 6 (64 characters).
"""

import msgspec
import pytest
from hypothesis import given, strategies as st

from aibridge.toolbox import MemoryToolbox
from aibridge.tools import MAX_NAME, Media, Outcome, Text, Tool, Toolset


def tool(name: str, description: str = "does it") -> Tool:
    return Tool(name, description, '{"type":"object"}', "s", name, "https://h/mcp")


def test_a_set_is_found_again_by_what_it_is() -> None:
    tools = Toolset([tool("a"), tool("b")])
    again = Toolset.decode(tools.encoded)
    assert again.tools == tools.tools
    assert again.digest == tools.digest
    assert Toolset([tool("b"), tool("a")]).digest != tools.digest
    assert Toolset([tool("a", "does something else"), tool("b")]).digest != tools.digest
    assert (tools.get("a"), tools.get("c"), tools.get(None)) == (tools.tools[0], None, None)
    assert len(tools) == 2 and not Toolset(())


def test_what_is_no_set() -> None:
    with pytest.raises(msgspec.DecodeError):
        Toolset.decode(b"[1]")


def test_a_client_keeps_its_names() -> None:
    tools = Toolset([tool("a"), tool("a_2"), tool("b")])
    found = tools.avoiding({"a", "x"})
    assert (found.digest, found.encoded) == (tools.digest, tools.encoded), "the same set, whoever else has which names"
    assert [one.name for one in found.tools] == ["a_2", "a_2_2", "b"]
    assert [one.tool for one in found.tools] == ["a", "a_2", "b"]
    assert tools.avoiding(()).digest == tools.digest


@given(st.lists(st.text("ab_2", min_size=1, max_size=MAX_NAME), unique=True), st.sets(st.text("ab_2", max_size=MAX_NAME)))
def test_names_are_unique_whatever_the_client_has(names: list[str], taken: set[str]) -> None:
    found = [one.name for one in Toolset(map(tool, names)).avoiding(taken).tools]
    assert len({*found}) == len(names)
    assert not taken & {*found}
    assert all(len(name) <= MAX_NAME for name in found)


def test_what_stands_for_media() -> None:
    assert Media("image", "image/png", "AAAA").described == "[image: image/png, 3 bytes; not shown]"
    assert Media("file", "application/pdf", "AAAA", "a.pdf").described == "[file a.pdf: application/pdf, 3 bytes; not shown]"


def test_a_failure_says_why_to_both() -> None:
    assert Outcome.failed("no") == Outcome((Text("no"),), is_error=True, error="no")


async def test_functions_as_tools() -> None:
    async def add(arguments: object) -> str:
        """Adds two numbers."""
        assert isinstance(arguments, dict)
        return str(arguments["a"] + arguments["b"])

    async def picture(_: object) -> Outcome:
        return Outcome((Media("image", "image/png", "AAAA"),))

    box = MemoryToolbox({"picture": picture, "add": add}, schemas={"add": '{"type":"object","required":["a","b"]}'})
    adding, showing = box.tools()
    assert (adding.name, adding.description, adding.tool) == ("bmcp_memory_add", "Adds two numbers.", "add")
    assert (showing.name, showing.description) == ("bmcp_memory_picture", "picture")
    assert await box.call(adding, '{"a":1,"b":2}') == Outcome((Text("3"),))
    assert (await box.call(showing, "{}")).content == (Media("image", "image/png", "AAAA"),)
    assert (await box.call(adding, '{"a":1}')).error == "KeyError: 'b'"
    assert (await box.call(tool("gone"), "{}")).is_error
