"""Credentials in the bodies of requests are found.

Truth: the types of the vendors' SDKs, which say where the protocols have any; that header fields about the message itself
are none, and that what is shorter than eight characters is a placeholder, are choices of ours.
"""

import json
import typing
from typing import Any, Final

import pytest
from anthropic.types.beta import BetaRequestMCPServerURLDefinitionParam
from openai.types.responses.container_network_policy_allowlist_param import ContainerNetworkPolicyAllowlistParam
from openai.types.responses.container_network_policy_domain_secret_param import ContainerNetworkPolicyDomainSecretParam
from openai.types.responses.tool_param import Mcp

from aibridge.wire import MESSAGES, RESPONSES
from aibridge.wire.credentials import credentials_in

TOKEN: Final = 'mcp/token-"of"-erin-é'
SERVER: Final[BetaRequestMCPServerURLDefinitionParam] = {
    "type": "url",
    "name": "s",
    "url": "https://mcp.test/sse",
    "authorization_token": TOKEN,
}
TOOL: Final[Mcp] = {"type": "mcp", "server_label": "s", "server_url": "https://mcp.test/mcp", "authorization": TOKEN}
WITH_HEADERS: Final[Mcp] = {
    "type": "mcp",
    "server_label": "s",
    "headers": {
        "X-Key": "key-of-frank",
        "Authorization": f"Bearer {TOKEN}",
        "Accept": "application/json",
        "X-Short": "short",
    },
}
DOMAIN: Final[ContainerNetworkPolicyDomainSecretParam] = {"domain": "api.test.example", "name": "A_NAME", "value": TOKEN}
ALLOWED: Final[ContainerNetworkPolicyAllowlistParam] = {
    "type": "allowlist",
    "allowed_domains": ["api.test.example"],
    "domain_secrets": [DOMAIN, {"domain": "api.test.example", "name": "ANOTHER", "value": "second-secret"}],
}
CONTAINER: Final = {"type": "code_interpreter", "container": {"type": "auto", "network_policy": ALLOWED}}


def messages(**more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}).encode()


def responses(*tools: Any, **more: Any) -> bytes:
    return json.dumps({"model": "m", "input": "hi", "tools": tools, **more}).encode()


def test_the_sdks_have_these_members() -> None:
    assert "authorization_token" in typing.get_type_hints(BetaRequestMCPServerURLDefinitionParam)
    assert {"authorization", "headers"} <= typing.get_type_hints(Mcp).keys()
    assert "domain_secrets" in typing.get_type_hints(ContainerNetworkPolicyAllowlistParam)


def test_servers_of_messages() -> None:
    body = messages(mcp_servers=[SERVER, {**SERVER, "authorization_token": "second-token"}])
    written = json.dumps(TOKEN)[1:-1]
    assert MESSAGES.parse(body).facts.secrets == (written, TOKEN, "second-token")


@pytest.mark.parametrize("servers", [None, [], [{}], [{**SERVER, "authorization_token": None}], "mcp", {"a": 1}])
def test_messages_without_credentials(servers: Any) -> None:
    assert MESSAGES.parse(messages(mcp_servers=servers)).facts.secrets == ()
    assert MESSAGES.parse(messages()).facts.secrets == ()


def test_tools_of_responses() -> None:
    assert TOKEN in RESPONSES.parse(responses(TOOL)).facts.secrets
    assert TOKEN in RESPONSES.parse(responses({"type": "function"}, CONTAINER)).facts.secrets


def test_header_fields_as_a_whole_and_without_their_scheme() -> None:
    found = RESPONSES.parse(responses(WITH_HEADERS)).facts.secrets
    assert {"key-of-frank", f"Bearer {TOKEN}", TOKEN} <= set(found)
    assert not {"application/json", "short"} & set(found)


def test_secrets_of_a_container_are_their_values() -> None:
    found = credentials_in("openai", responses(CONTAINER))
    assert {TOKEN, "second-secret"} <= set(found) and not {"api.test.example", "A_NAME", "ANOTHER"} & set(found)


@pytest.mark.parametrize("tools", [None, [], "mcp", [{"type": "function", "name": "mcp"}], [{"type": "mcp"}]])
def test_responses_without_credentials(tools: Any) -> None:
    body = json.dumps({"model": "m", "input": "hi", "tools": tools}).encode()
    assert RESPONSES.parse(body).facts.secrets == ()


def test_the_schema_of_a_tool_that_takes_header_fields_is_no_credential() -> None:
    schema = {"headers": {"type": "object", "description": "Fields to send"}, "authorization": {"type": "string"}}
    function = {"type": "function", "name": "fetch", "parameters": {"properties": schema, "required": ["authorization"]}}
    assert credentials_in("openai", responses(function)) == ()


def test_a_header_field_may_be_called_anything() -> None:
    fields = {"type": "x", "description": "of a server that wants one", "Authorization": f"Bearer {TOKEN}"}
    found = credentials_in("openai", responses({"type": "mcp", "server_label": "s", "headers": fields}))
    assert TOKEN in found and "of a server that wants one" not in found


def test_a_prompt_that_speaks_of_credentials_holds_none() -> None:
    said = json.dumps({"authorization_token": TOKEN, "authorization": TOKEN, "headers": {"X-Key": TOKEN}})
    assert credentials_in("openai", responses(input=said)) == ()
    assert credentials_in("anthropic", messages(system=said)) == ()


@pytest.mark.parametrize("indent", [None, 1])
def test_of_a_body_that_is_cut_off_nothing_escapes(indent: int | None) -> None:
    """A dump may end anywhere. What there is of a credential by then is one, unless it is too short."""
    for tool, secret in ((TOOL, TOKEN), (WITH_HEADERS, "key-of-frank"), (CONTAINER, "second-secret")):
        body = json.dumps({"tools": [tool]}, ensure_ascii=False, indent=indent).encode()
        written = json.dumps(secret, ensure_ascii=False)[1:-1].encode()
        start = body.index(written)
        for end in range(start + 8, start + len(written) + 1):
            shown = body[start:end].decode(errors="replace")
            assert any(
                shown.startswith(found) and len(shown) - len(found) <= 1 for found in credentials_in("openai", body[:end])
            )


@pytest.mark.parametrize("padding", range(256 * 1024 - 60, 256 * 1024 + 60, 7))
def test_wherever_they_stand(padding: int) -> None:
    """A body is searched in slices."""
    assert credentials_in("anthropic", messages(a="x" * padding, mcp_servers=[SERVER]))[-1] == TOKEN


def test_nobody_makes_us_remember_millions() -> None:
    body = messages(mcp_servers=[{"authorization_token": f"token-{number:06}"} for number in range(50_000)])
    assert len(MESSAGES.parse(body).facts.secrets) == 1000
    many = {f"X-{number}": f"secret-{number:06}" for number in range(50_000)}
    assert 1000 <= len(RESPONSES.parse(responses({"type": "mcp", "headers": many})).facts.secrets) <= 1002
    both = [{"type": "mcp", "headers": dict(list(many.items())[start : start + 900])} for start in range(0, 9000, 900)]
    assert 1000 <= len(RESPONSES.parse(responses(*both)).facts.secrets) <= 1002


def test_a_body_full_of_names_without_credentials_is_not_read_to_its_end() -> None:
    assert credentials_in("openai", b'"authorization":1,' * 1001 + b'"authorization":"a-secret"') == ()


HOSTILE: Final = {
    "nested": b'"headers":{' * 200_000,
    "arrays": b'"domain_secrets":[' * 200_000,
    "strings": b'"authorization":"' * 200_000,
    "escapes": b'"headers":{"' + b'\\"' * 1_000_000,
    "spaces": b'"headers"' + b" " * 2_000_000,
    "quotes": b'"headers":{' + b'"' * 2_000_000,
    "names": b'"authorization"' * 200_000,
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_what_it_takes_grows_with_the_body_and_no_faster(body: bytes) -> None:
    """Clients decide what there is to read. Were anything looked at once for each name or quote, this took hours."""
    credentials_in("openai", body)


def test_what_stands_in_header_fields_of_any_depth() -> None:
    found = credentials_in("openai", b'{"headers":{"headers":{"X-Key":"first-secret"}},"authorization":"second-secret"}')
    assert found == ("first-secret", "second-secret")


@pytest.mark.parametrize(
    "body", [b"", b"{", b'"authorization', b'"authorization":"\xff\xff\xff\xff\xff\xff\xff\xff\\', b'"headers":{"a']
)
def test_whatever_is_in_a_body(body: bytes) -> None:
    credentials_in("openai", body)
