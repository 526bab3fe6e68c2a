"""Row 12 of failures.md: one credential goes upstream, and no secret stays here.

Truth: the row; wire.md A1 (two generations of Anthropic clients, either header on every route, both at once from Claude
Code's key helper); design.md 3 (bring your own key, a configured key, what is never written anywhere).
"""

from collections.abc import Iterator

import pytest

from tests.support.gateway import KEYS, Scene, Stage, staged
from tests.support.provider import Received, Reply
from tests.support.recording import Recording
from tests.support.streams import PROVIDERS, events, target
from tests.support.traffic import named

ANTHROPIC_KEY = "sk-ant-api03-clients-own-Zq81"
OAUTH_TOKEN = "sk-ant-oat01-clients-oauth-Kw07"
OPENAI_KEY = "sk-proj-clients-own-Vb33"

OLD, NEW = "2023-06-01", "2026-10-21"

MESSAGES, CHAT, RESPONSES = (named(name) for name in ("messages-text-blocking", "chat-text-stream", "responses-text-stream"))


def credentials(received: Received) -> list[tuple[str, str]]:
    """Every field that could be one, whatever the case of its name."""
    fields = [(name.decode().lower(), value.decode("latin-1")) for name, value in received.headers]
    return [
        field for field in fields if field[0] in ("authorization", "x-api-key", "api-key", "proxy-authorization", "cookie")
    ]


BROUGHT = [
    (OLD, [("x-api-key", ANTHROPIC_KEY)], ("x-api-key", ANTHROPIC_KEY)),
    (OLD, [("X-Api-Key", ANTHROPIC_KEY)], ("x-api-key", ANTHROPIC_KEY)),
    (OLD, [("Authorization", f"Bearer {OAUTH_TOKEN}")], ("authorization", f"Bearer {OAUTH_TOKEN}")),
    (NEW, [("Authorization", f"Bearer {ANTHROPIC_KEY}")], ("authorization", f"Bearer {ANTHROPIC_KEY}")),
    (NEW, [("x-api-key", ANTHROPIC_KEY)], ("x-api-key", ANTHROPIC_KEY)),
    (None, [("x-api-key", ANTHROPIC_KEY)], ("x-api-key", ANTHROPIC_KEY)),
    # Claude Code's key helper sends both, with the same value.
    (
        OLD,
        [("Authorization", f"Bearer {ANTHROPIC_KEY}"), ("x-api-key", ANTHROPIC_KEY)],
        ("x-api-key", ANTHROPIC_KEY),
    ),
    (
        NEW,
        [("x-api-key", ANTHROPIC_KEY), ("Authorization", f"Bearer {ANTHROPIC_KEY}")],
        ("authorization", f"Bearer {ANTHROPIC_KEY}"),
    ),
    # The same field twice, in two spellings.
    (OLD, [("X-Api-Key", ANTHROPIC_KEY), ("x-api-key", ANTHROPIC_KEY)], ("x-api-key", ANTHROPIC_KEY)),
    (OLD, [("x-api-key", ""), ("Authorization", f"Bearer {OAUTH_TOKEN}")], ("authorization", f"Bearer {OAUTH_TOKEN}")),
]


@pytest.mark.parametrize("route", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(("version", "headers", "expected"), BROUGHT)
async def test_the_clients_own_credential_goes_upstream_once(
    route: str, version: str | None, headers: list[tuple[str, str]], expected: tuple[str, str], scene: Scene
) -> None:
    scene.reply(Reply.json({"input_tokens": 1}))
    if version is not None:
        headers = [*headers, ("anthropic-version", version)]
    answer = await scene.post(f"/anthropic{route}", MESSAGES.request, headers)
    assert answer.head.status == 200
    assert credentials(scene.requests[0]) == [expected]
    if route == "/v1/messages":
        check_row(scene, "byok", expected[1].removeprefix("Bearer "))


@pytest.mark.parametrize("recording", [CHAT, RESPONSES], ids=str)
async def test_an_openai_clients_own_key(recording: Recording, scene: Scene) -> None:
    scene.reply(recording.reply())
    await scene.post(target(recording), recording.request, [("Authorization", f"Bearer {OPENAI_KEY}"), ("api-version", "1")])
    assert credentials(scene.requests[0]) == [("authorization", f"Bearer {OPENAI_KEY}")]
    check_row(scene, "byok", OPENAI_KEY)


def check_row(scene: Scene, kind: str | None, secret: str | None) -> None:
    row = scene.ledger().interception
    hint = row["credential_hint"]
    assert row["credential_kind"] == kind
    if secret is None:
        assert hint is None
        return
    assert hint
    shared = [size for size in range(1, len(secret)) if secret[-size:] in hint or secret[:size] in hint]
    assert max(shared, default=0) <= 4, hint


async def test_two_credentials_have_two_hints(scene: Scene) -> None:
    scene.handler = lambda _: Reply.json(b"{}")
    for key in ("sk-ant-api03-aaaaaaaaaaaaaaaa-1111", "sk-ant-api03-aaaaaaaaaaaaaaaa-2222", "short-1"):
        await scene.post(target(MESSAGES), MESSAGES.request, [("x-api-key", key)])
    hints = {row["credential_hint"] for row in scene.ledger().interceptions}
    assert hints == {"...1111", "...2222", "..."}


async def test_no_credential_is_made_up(scene: Scene) -> None:
    """A local model server wants none; a provider that does says so itself."""
    recording = named("messages-error-401")
    scene.reply(recording.reply())
    answer = await scene.post(target(recording), recording.request)
    assert (answer.head.status, answer.body) == (401, recording.response)
    assert credentials(scene.requests[0]) == []
    check_row(scene, None, None)


CONFIGURED = [
    ("keyed", "/v1/messages", OLD, ("x-api-key", KEYS["keyed"])),
    ("keyed", "/v1/messages", NEW, ("authorization", f"Bearer {KEYS['keyed']}")),
    ("keyed", "/v1/messages/count_tokens", OLD, ("x-api-key", KEYS["keyed"])),
    ("keyed-openai", "/v1/chat/completions", "", ("authorization", f"Bearer {KEYS['keyed-openai']}")),
    ("keyed-openai", "/v1/responses", "", ("authorization", f"Bearer {KEYS['keyed-openai']}")),
    ("keyed-openai", "/v1/conversations", "", ("authorization", f"Bearer {KEYS['keyed-openai']}")),
]


@pytest.mark.parametrize(
    "brought",
    [
        [],
        [("x-api-key", ANTHROPIC_KEY)],
        [("Authorization", f"Bearer {OPENAI_KEY}")],
        [("X-Api-Key", ANTHROPIC_KEY), ("Authorization", f"Bearer {OPENAI_KEY}"), ("Cookie", "session=" + OPENAI_KEY)],
        [("Authorization", "Basic dXNlcjpwYXNz"), ("Proxy-Authorization", "Basic dXNlcjpwYXNz")],
    ],
    ids=["none", "x-api-key", "bearer", "all", "basic"],
)
@pytest.mark.parametrize(("provider", "route", "version", "expected"), CONFIGURED)
async def test_a_configured_key_takes_the_place_of_whatever_came(
    provider: str, route: str, version: str, expected: tuple[str, str], brought: list[tuple[str, str]], scene: Scene
) -> None:
    scene.reply(Reply.json(b"{}"))
    headers = [*brought, ("anthropic-version", version)] if version else brought
    answer = await scene.post(f"/{provider}{route}", b'{"model":"m"}', headers)
    assert answer.head.status == 200
    (received,) = scene.requests
    assert credentials(received) == [expected]
    for secret in (ANTHROPIC_KEY, OPENAI_KEY, "dXNlcjpwYXNz"):
        assert not any(secret.encode() in value for _, value in received.headers)
    if route in ("/v1/messages", "/v1/chat/completions", "/v1/responses"):
        check_row(scene, "centralized", KEYS[provider])


# --- nothing is kept --------------------------------------------------------------------------------------------------


def check_kept_nowhere(scene: Scene, *secrets: str) -> None:
    kept = scene.gateway.dump() + scene.gateway.output.encode()
    assert scene.tag.encode() in kept
    for secret in secrets:
        assert secret.encode() not in kept


@pytest.mark.parametrize("recording", [MESSAGES, CHAT, RESPONSES], ids=str)
@pytest.mark.parametrize("suffix", ["", "keyed", "absent"])
async def test_no_secret_is_written_anywhere(recording: Recording, suffix: str, scene: Scene) -> None:
    """Success or failure, whoever's key: not in the database, its log or spool, not in the server's output."""
    if suffix != "absent":
        scene.reply(recording.reply())
    headers = [("Authorization", f"Bearer {OPENAI_KEY}"), ("x-api-key", ANTHROPIC_KEY), ("Cookie", f"c={OAUTH_TOKEN}")]
    await scene.post(target(recording, suffix), recording.request, headers)
    assert len(scene.ledger().interceptions) == 1
    check_kept_nowhere(scene, OPENAI_KEY, ANTHROPIC_KEY, OAUTH_TOKEN, *KEYS.values())


@pytest.mark.parametrize("provider", ["openai", "keyed-openai"])
async def test_a_provider_that_quotes_the_key(provider: str, scene: Scene) -> None:
    """As OpenAI does. The client gets the words as they are; the ledger gets them without the key."""
    key = KEYS.get(provider, OPENAI_KEY)
    message = f"Incorrect API key provided: {key}. You can find your API key at ..."
    scene.reply(Reply.json({"error": {"message": message, "type": "invalid_request_error", "code": "invalid_api_key"}}, 401))
    answer = await scene.post(f"/{provider}/v1/chat/completions", CHAT.request, [("Authorization", f"Bearer {OPENAI_KEY}")])
    assert answer.head.status == 401
    assert "Incorrect API key provided" in scene.ledger().interception["error"]
    check_kept_nowhere(scene, OPENAI_KEY, *KEYS.values())


async def test_a_provider_that_quotes_the_key_in_a_stream(scene: Scene) -> None:
    error = f'event: error\ndata: {{"type":"error","error":{{"type":"x","message":"bad key {ANTHROPIC_KEY}"}}}}\n\n'
    recording = named("messages-text-stream")
    scene.reply(Reply.stream([*events(recording.response)[:2], error.encode()]))
    answer = await scene.post(target(recording), recording.request, [("x-api-key", ANTHROPIC_KEY)])
    assert answer.body.endswith(error.encode())
    assert "bad key" in scene.ledger().interception["error"]
    check_kept_nowhere(scene, ANTHROPIC_KEY)


# --- a credential for the gateway itself ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def behind_a_proxy() -> Iterator[Stage]:
    """A gateway that believes a proxy on this machine who the user is."""
    with staged(toml='[identity]\nheader = "X-Forwarded-User"\n') as stage:
        yield stage


@pytest.mark.parametrize("recording", [MESSAGES, CHAT, RESPONSES], ids=str)
async def test_who_the_user_is_does_not_go_upstream(recording: Recording, behind_a_proxy: Stage) -> None:
    with behind_a_proxy.scene() as scene:
        scene.reply(recording.reply(), Reply.json(b"{}"))
        identity = [("x-forwarded-USER", "ada@example.com")]
        assert (await scene.post(target(recording), recording.request, identity)).head.status == 200
        async with scene.client() as client:
            models = f"/{PROVIDERS[recording.format]}/v1/models"
            assert (await client.request("GET", models, scene.lines(*identity))).head.status == 200
        assert all(received.header("x-forwarded-user") == [] for received in scene.requests)
        assert scene.ledger().interception["initiator_id"] == "ada@example.com"


@pytest.mark.parametrize("headers", [[], [("X-Forwarded-User", "")], [("X-Forwarded-User", "a"), ("x-forwarded-user", "b")]])
async def test_nobody_is_not_served(headers: list[tuple[str, str]], behind_a_proxy: Stage) -> None:
    with behind_a_proxy.scene() as scene:
        answer = await scene.post(target(MESSAGES), MESSAGES.request, [*headers, ("x-api-key", ANTHROPIC_KEY)])
        assert answer.head.status == 401
        assert b'"authentication_error"' in answer.body
        assert scene.requests == []
        assert scene.ledger().interceptions == []
