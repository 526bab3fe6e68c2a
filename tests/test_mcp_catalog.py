"""What is offered under which name.

Truth: design.md 3 (names, allow and deny), clients.md 6 (`[A-Za-z0-9_-]{1,64}`), issue 3 (identical bytes however servers
list); schemas: what OpenAI's API says of one that it refuses.
"""

import json
import logging
import random
import re
from typing import Any

import mcp_types as types
import msgspec
import pytest
from hypothesis import given, strategies as st

from aibridge.mcp.catalog import Catalog
from aibridge.mcp.settings import McpServer
from aibridge.tools import Toolset

HERE = McpServer(command=("x",))


def tool(name: str, description: str | None = None, *, read_only: bool | None = None, **schema: Any) -> types.Tool:
    annotations = types.ToolAnnotations(read_only_hint=read_only)
    return types.Tool(name=name, description=description, input_schema={"type": "object", **schema}, annotations=annotations)


def catalog(*tools: types.Tool, server: McpServer = HERE) -> Catalog:
    found = Catalog({"s": server})
    found.update("s", tools, {})
    return found


def names(found: Catalog) -> dict[str, str]:
    return {offered.tool: offered.name for offered in found.tools()}


def reasons(found: Catalog) -> dict[str, str | None]:
    return {entry.tool: entry.reason for entry in found.entries("s")}


def test_a_tool_as_models_see_it() -> None:
    (offered,) = catalog(tool("add", "Adds.", properties={"b": {}, "a": {}})).tools()
    assert msgspec.structs.asdict(offered) == {
        "name": "bmcp_s_add",
        "description": "Adds.",
        "schema": '{"properties":{"a":{},"b":{}},"type":"object"}',
        "server": "s",
        "tool": "add",
        "server_url": "x",
    }


def test_a_tool_without_a_description_has_its_title_or_its_name() -> None:
    titled = types.Tool(name="b", title="B!", input_schema={"type": "object"})
    assert [offered.description for offered in catalog(tool("a"), titled).tools()] == ["a", "B!"]


def test_deny_wins_and_an_allow_list_keeps_the_rest_out(caplog: pytest.LogCaptureFixture) -> None:
    server = McpServer(command=("x",), allow=("^get_", "list"), deny=("secret",))
    found = catalog(tool("get_a"), tool("get_secret"), tool("my_list"), tool("put"), server=server)
    assert names(found) == {"get_a": "bmcp_s_get_a", "my_list": "bmcp_s_my_list"}
    assert reasons(found) == {"get_a": None, "get_secret": "denied by 'secret'", "my_list": None, "put": "not allowed"}
    found.update("s", [tool("get_secret")], {})
    assert [record.getMessage() for record in caplog.records] == [
        "MCP server s: 'get_secret' is allowed by '^get_' and denied by 'secret'; deny wins"
    ]


def test_read_only_keeps_what_is_annotated_so() -> None:
    server = McpServer(command=("x",), read_only=True)
    found = catalog(tool("a", read_only=True), tool("b", read_only=False), tool("c"), server=server)
    assert reasons(found) == {"a": None, "b": "not read-only", "c": "not read-only"}


@pytest.mark.parametrize("schema", [{"type": "string"}, {"anyOf": []}, {"not": {}}, {"enum": [{}]}])
def test_a_schema_that_providers_refuse_keeps_its_tool_out(schema: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise each request that offers it would fail."""
    found = catalog(types.Tool(name="bad", input_schema={"type": "object", **schema}), tool("good"))
    assert list(names(found)) == ["good"]
    assert str(reasons(found)["bad"]).startswith("bad schema: ")
    assert "'bad' is left out: bad schema" in caplog.text


def test_names_are_encoded_cut_and_told_apart() -> None:
    found = names(catalog(*map(tool, ["a.b", "a/b", "a_b", "c.d", "l" * 80, "l" * 81, "ü"])))
    assert found["a_b"] == "bmcp_s_a_b"  # nobody takes what is a tool's own
    assert found["c.d"] == "bmcp_s_c_d"
    assert re.fullmatch("bmcp_s_a_b_[0-9a-f]{8}", found["a.b"])
    assert re.fullmatch("bmcp_s_l{48}_[0-9a-f]{8}", found["l" * 80])
    assert len(set(found.values())) == 7


def test_a_tool_that_bears_anothers_digest_does_not_take_its_name() -> None:
    digested = names(catalog(tool("a.b"), tool("a_b")))["a.b"].removeprefix("bmcp_s_")
    found = names(catalog(tool("a.b"), tool("a_b"), tool(digested)))
    assert len(set(found.values())) == 3
    assert found[digested] == f"bmcp_s_{digested}"


def test_a_name_given_twice_means_the_same_tool_in_any_order(caplog: pytest.LogCaptureFixture) -> None:
    twice = [tool("a", "One."), tool("a", "Two.")]
    assert catalog(*twice).tools() == catalog(*reversed(twice)).tools()
    assert "more than once" in caplog.text
    assert reasons(catalog(tool(""))) == {"": "bad name: it is empty"}


own_names = st.text(st.sampled_from("ab._/é-"), min_size=1, max_size=70)


@given(st.dictionaries(st.sampled_from(["s", "s-2", "t"]), st.lists(own_names, unique=True, max_size=6)), st.randoms())
def test_the_order_of_everything_changes_nothing(listed: dict[str, list[str]], chance: random.Random) -> None:
    first, second = Catalog(dict.fromkeys(["s", "s-2", "t"], HERE)), Catalog(dict.fromkeys(["t", "s", "s-2"], HERE))
    for server, own in listed.items():
        first.update(server, [tool(name, properties={"x": {}, "y": {}}) for name in own], {})
    for server, own in chance.sample(sorted(listed.items()), len(listed)):
        second.update(server, [tool(name, properties={"y": {}, "x": {}}) for name in chance.sample(own, len(own))], {})
    assert Toolset(first.tools()).encoded == Toolset(second.tools()).encoded
    offered = first.tools()
    assert len({each.name for each in offered}) == len(offered) == sum(map(len, listed.values()))
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,64}", each.name) for each in offered)
    assert [(each.server, each.tool) for each in offered] == sorted((each.server, each.tool) for each in offered)
    assert all(json.loads(each.schema)["type"] == "object" for each in offered)


def test_the_first_definition_is_trusted_and_a_change_is_told(caplog: pytest.LogCaptureFixture) -> None:
    found = Catalog({"s": HERE})
    (new,) = found.update("s", [tool("a", "One.")], {})
    approved = {("s", "a"): new.digest}
    assert found.update("s", [tool("a", "One.")], approved) == []
    for description in ("Two.", "Two.", "Three."):
        assert found.update("s", [tool("a", description)], approved) == []
    (entry,) = found.entries("s")
    assert entry.is_changed
    assert names(found) == {"a": "bmcp_s_a"}
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2  # one for each change
    found.approve(entry)
    assert not found.entries("s")[0].is_changed


def test_a_changed_tool_is_withheld_until_it_is_approved() -> None:
    server = McpServer(command=("x",), on_change="withhold")
    found = Catalog({"s": server})
    (new,) = found.update("s", [tool("a", properties={"x": {}})], {})
    assert names(found) == {"a": "bmcp_s_a"}
    found.update("s", [tool("a", properties={"y": {}})], {("s", "a"): new.digest})
    assert names(found) == {}
    assert (
        found.refusal("s", "a")
        == "The tool 'a' of the MCP server 's' is not offered any more: changed since it was approved."
    )
    found.approve(found.entries("s")[0])
    assert found.refusal("s", "a") is None


def test_where_approvals_cannot_be_read_nothing_new_is_trusted() -> None:
    withholding = Catalog({"s": McpServer(command=("x",), on_change="withhold")})
    assert withholding.update("s", [tool("a")], None) == []
    assert names(withholding) == {}
    assert [entry.tool for entry in withholding.update("s", [tool("a")], {})] == ["a"]
    assert names(withholding) == {"a": "bmcp_s_a"}
    withholding.update("s", [tool("a"), tool("b")], None)  # what is known of them holds
    assert names(withholding) == {"a": "bmcp_s_a"}
    reporting = Catalog({"s": HERE})
    reporting.update("s", [tool("a")], None)
    assert names(reporting) == {"a": "bmcp_s_a"}


def test_what_is_gone_is_refused() -> None:
    found = catalog(tool("a"))
    assert found.refusal("s", "b") == "The MCP server 's' has no tool 'b' any more."
    assert found.knows("s") and not found.knows("t")
