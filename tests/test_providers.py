"""Providers as data: their routes, names and URLs.

Truth: the tables of design.md 3; RFC 3986 for what a path is. What is not in the table is not forwarded.
"""

import posixpath
from urllib.parse import unquote

import pytest
from hypothesis import given, strategies as st

from aibridge.providers import RESERVED_NAMES, Provider
from aibridge.wire import CHAT, MESSAGES, RESPONSES, WireFormat

ANTHROPIC = Provider.anthropic()
OPENAI = Provider.openai()

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get")
READ = {"GET", "HEAD"}
WRITE = {"POST"}
ANY = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"}


@pytest.mark.parametrize(
    ("provider", "path", "methods", "pattern", "form"),
    [
        (ANTHROPIC, "/v1/messages", WRITE, "/v1/messages", MESSAGES),
        (ANTHROPIC, "/v1/messages/count_tokens", WRITE, "/v1/messages/count_tokens", None),
        (ANTHROPIC, "/v1/models", READ, "/v1/models", None),
        (ANTHROPIC, "/v1/models/claude-opus-5-5", READ, "/v1/models/{id}", None),
        (ANTHROPIC, "/v1/models/a%20b%3Ac", READ, "/v1/models/{id}", None),
        (ANTHROPIC, "/api/event_logging/batch", ANY, "/api/event_logging/*", None),
        (ANTHROPIC, "/api/event_logging/v2/batch", ANY, "/api/event_logging/*", None),
        (OPENAI, "/v1/chat/completions", WRITE, "/v1/chat/completions", CHAT),
        (OPENAI, "/v1/responses", WRITE, "/v1/responses", RESPONSES),
        (OPENAI, "/v1/responses/resp_1", ANY, "/v1/responses/*", None),
        (OPENAI, "/v1/responses/resp_1/cancel", ANY, "/v1/responses/*", None),
        (OPENAI, "/v1/responses/resp_1/input_items", ANY, "/v1/responses/*", None),
        (OPENAI, "/v1/responses/compact", ANY, "/v1/responses/*", None),
        (OPENAI, "/v1/models", READ, "/v1/models", None),
        (OPENAI, "/v1/models/gpt-5.4", READ, "/v1/models/{id}", None),
        (OPENAI, "/v1/conversations", ANY, "/v1/conversations", None),
        (OPENAI, "/v1/conversations/conv_1/items/msg_1", ANY, "/v1/conversations/*", None),
    ],
)
def test_routes(provider: Provider, path: str, methods: set[str], pattern: str, form: WireFormat | None) -> None:
    for method in METHODS:
        route = provider.route(method, path)
        if method in methods:
            assert route is not None
            assert (route.pattern, route.format) == (pattern, form)
        else:
            assert route is None


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize(
    ("provider", "path"),
    [
        (ANTHROPIC, ""),
        (ANTHROPIC, "/"),
        (ANTHROPIC, "/v1"),
        (ANTHROPIC, "/v1/messages/"),
        (ANTHROPIC, "/v1/messages/batches"),
        (ANTHROPIC, "/v1/Messages"),
        (ANTHROPIC, "/v1/messages%2Fcount_tokens"),
        (ANTHROPIC, "/v1/%6dessages"),
        (ANTHROPIC, "//v1/messages"),
        (ANTHROPIC, "/v1//messages"),
        (ANTHROPIC, "/v1/./messages"),
        (ANTHROPIC, "/v1/models/../messages"),
        (ANTHROPIC, "/v1/models/"),
        (ANTHROPIC, "/v1/models/a/b"),
        (ANTHROPIC, "/v1/organizations/users"),
        (ANTHROPIC, "/v1/files"),
        (ANTHROPIC, "/api/event_logging"),
        (ANTHROPIC, "/api/event_logging/"),
        (ANTHROPIC, "/api/hello"),
        (ANTHROPIC, "/v1/chat/completions"),
        (OPENAI, "/v1/messages"),
        (OPENAI, "/chat/completions"),
        (OPENAI, "/v1/chat/completions/chatcmpl_1"),
        (OPENAI, "/v1/responses/"),
        (OPENAI, "/v1/responses//cancel"),
        (OPENAI, "/v1/responses/a/"),
        (OPENAI, "/v1/embeddings"),
        (OPENAI, "/v1/files"),
        (OPENAI, "/v1/organization/admin_api_keys"),
        (OPENAI, "/v1/conversationsx"),
    ],
)
def test_what_is_no_route(provider: Provider, path: str, method: str) -> None:
    assert provider.route(method, path) is None


CLIMBING = ["..", ".", "%2e%2e", "%2E%2e", ".%2e", "%2e", "a%2fb", "a%2F..%2Fb", "%5c..", "..%5c", "a\\b", "\\"]
HIDDEN = ["%252e%252e", "%252f", "%25", "a%25b", ""]


@pytest.mark.parametrize("segment", [*CLIMBING, *HIDDEN])
def test_a_segment_stays_one_segment(segment: str) -> None:
    """Whatever a server behind us decodes, and how often: an admin route is not reached by climbing."""
    for path in (f"/v1/responses/{segment}", f"/v1/responses/{segment}/organization", f"/v1/responses/a/{segment}/b"):
        assert OPENAI.route("GET", path) is None
    if segment != "a%2fb":
        assert ANTHROPIC.route("GET", f"/v1/models/{segment}") is None
    assert ANTHROPIC.route("POST", f"/api/event_logging/{segment}") is None


SEGMENTS = st.sampled_from([*CLIMBING, *HIDDEN, "a", "responses", "v1"]) | st.text(max_size=6)
PREFIXES = st.sampled_from(["/v1/responses/", "/v1/models/", "/v1/conversations/", "/api/event_logging/", "/"])


@given(PREFIXES, st.lists(SEGMENTS, max_size=6).map("/".join))
def test_no_path_climbs(prefix: str, rest: str) -> None:
    path = prefix + rest
    if ANTHROPIC.route("GET", path) or OPENAI.route("GET", path):
        decoded = path
        for _ in range(3):
            decoded = unquote(decoded).replace("\\", "/")
            assert posixpath.normpath(decoded) == decoded
            assert decoded.count("/") == path.count("/")


# --- names and URLs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "anthropic", "openai-2", "my_proxy", "0", "a" * 64])
def test_names(name: str) -> None:
    assert Provider.anthropic(name).name == name


@pytest.mark.parametrize(
    "name", ["", "A", "a b", "a/b", "ä", "-a", "a-", "_a", "a.b", "..", "a" * 65, "a\n", *sorted(RESERVED_NAMES)]
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"^provider name .*: up to 64 lower-case letters"):
        Provider.anthropic(name)


def test_the_servers_own_routes_are_no_names() -> None:
    assert set(RESERVED_NAMES) == {"api", "healthz", "metrics", "readyz", "ui"}


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", "must be an http:// or https:// URL"),
        ("api.anthropic.com", "must be an http:// or https:// URL"),
        ("ftp://example.test", "must be an http:// or https:// URL"),
        ("http://", "must be an http:// or https:// URL"),
        ("http://[::1", "must be an http:// or https:// URL"),
        ("http://example.test:port", "must be an http:// or https:// URL"),
        ("http://example.test:99999/v1", "must be an http:// or https:// URL"),
        ("http://example.test/a b", "must be an http:// or https:// URL"),
        ("http://example.test/\n", "must be an http:// or https:// URL"),
        ("https://example.test/v1?key=x", "without a query"),
        ("https://example.test/v1#x", "without a query"),
        ("https://user:secret@example.test", "must not hold credentials"),
        ("https://user@example.test", "must not hold credentials"),
    ],
)
def test_what_is_no_base_url(url: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        Provider.openai(base_url=url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("provider", "path", "query", "url"),
    [
        (ANTHROPIC, "/v1/messages", "", "https://api.anthropic.com/v1/messages"),
        (ANTHROPIC, "/v1/messages", "beta=true", "https://api.anthropic.com/v1/messages?beta=true"),
        (OPENAI, "/v1/responses", "", "https://api.openai.com/v1/responses"),
        (OPENAI, "/v1/models/a%20b", "x=%2F&y", "https://api.openai.com/v1/models/a%20b?x=%2F&y"),
        (Provider.openai(base_url="http://localhost:11434/v1/"), "/v1/models", "", "http://localhost:11434/v1/models"),
        (Provider.openai(base_url="http://h/openai"), "/v1/responses", "", "http://h/openai/responses"),
        (Provider.anthropic(base_url="https://h/a/"), "/v1/messages", "", "https://h/a/v1/messages"),
    ],
)
def test_urls(provider: Provider, path: str, query: str, url: str) -> None:
    """A base URL is what a client's would be: OpenAI's ends in /v1, Anthropic's before it (design.md 3)."""
    assert provider.url(path, query) == url


def test_a_key_is_not_shown() -> None:
    assert "sk-secret" not in repr(Provider.openai(api_key="sk-secret"))
    assert "sk-secret" not in str(Provider.anthropic(api_key="sk-secret"))


def test_kinds() -> None:
    assert (Provider.anthropic("a").kind, Provider.openai("o").kind) == ("anthropic", "openai")


@pytest.mark.parametrize("model", ["meta-llama%2FLlama-3.1-8B", "a%2fb%2Fc:free", "gpt-5.4"])
def test_a_model_may_have_slashes_in_its_name(model: str) -> None:
    """As those of vLLM and OpenRouter have; the SDKs encode them."""
    assert OPENAI.route("GET", f"/v1/models/{model}") is not None
    assert OPENAI.route("GET", f"/v1/models/{model}%2F..") is None
    assert OPENAI.route("GET", f"/v1/models/{model}%2F") is None
