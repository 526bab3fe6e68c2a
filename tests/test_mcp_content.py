"""Every kind of content as text or media.

Truth: MCP 2025-11-25 and 2026-07-28 (server/tools), as the SDK's types spell them; what is kept of what is too large, and
how it is said: our choice.
"""

from typing import Any

import mcp_types as types
import pytest
from hypothesis import given, strategies as st

from aibridge.mcp.content import NOTHING, outcome_of
from aibridge.tools import Media, Outcome, Text
from tests.support.mcp_servers import PIXEL

ROOM = 10_000


def result(*content: types.ContentBlock, **more: Any) -> types.CallToolResult:
    return types.CallToolResult(content=list(content), **more)


def text(value: str) -> types.TextContent:
    return types.TextContent(text=value)


def blob(mime_type: str | None) -> types.EmbeddedResource:
    return types.EmbeddedResource(resource=types.BlobResourceContents(uri="file:///a", blob="AAAA", mime_type=mime_type))


@pytest.mark.parametrize(
    ("given_block", "piece"),
    [
        (text("a"), Text("a")),
        (types.ImageContent(data=PIXEL, mime_type="image/png"), Media("image", "image/png", PIXEL)),
        (types.AudioContent(data="AAAA", mime_type="audio/wav"), Media("audio", "audio/wav", "AAAA")),
        (types.EmbeddedResource(resource=types.TextResourceContents(uri="a:b", text="c")), Text("c")),
        (blob("image/gif"), Media("image", "image/gif", "AAAA", "file:///a")),
        (blob("audio/ogg"), Media("audio", "audio/ogg", "AAAA", "file:///a")),
        (blob(None), Media("file", "application/octet-stream", "AAAA", "file:///a")),
        (types.ResourceLink(name="n", uri="a:b", description="What it is."), Text("Resource a:b (n): What it is.")),
        (types.ResourceLink(name="n", title="T", uri="a:b"), Text("Resource a:b (T)")),
    ],
)
def test_every_kind_of_content(given_block: types.ContentBlock, piece: Text | Media) -> None:
    assert outcome_of(result(given_block), ROOM) == Outcome((piece,))


@pytest.mark.parametrize("content", [[], [text("")], [text(" \n"), text("")]])
def test_what_says_nothing_says_so(content: list[types.ContentBlock]) -> None:
    assert outcome_of(result(*content), ROOM).content == (NOTHING,)
    assert outcome_of(result(*content, is_error=True), ROOM).is_error


@pytest.mark.parametrize(
    ("texts", "structured", "expected"),
    [
        ([], {"n": 1}, ['{"n":1}']),
        (["It is one."], {"n": 1}, ["It is one.", '{"n":1}']),
        (['{ "n": 1 }'], {"n": 1}, ['{ "n": 1 }']),
        (["3"], {"result": 3}, ["3"]),  # the Python SDK
        (["Bern"], {"result": "Bern"}, ["Bern"]),
        (["Bern", "Oslo"], {"result": ["Bern", "Oslo"]}, ["Bern", "Oslo"]),  # fastmcp 2
        (['["Bern","Oslo"]'], {"result": ["Bern", "Oslo"]}, ['["Bern","Oslo"]']),  # fastmcp 4
        (["4"], {"result": 3}, ["4", '{"result":3}']),
        ([], [1], ["[1]"]),  # any JSON, from 2026-07-28 on
    ],
)
def test_structured_content_is_said_once(texts: list[str], structured: Any, expected: list[str]) -> None:
    found = outcome_of(result(*map(text, texts), structured_content=structured), ROOM)
    assert [piece.text for piece in found.content if isinstance(piece, Text)] == expected


def test_an_error_tells_the_model_and_the_ledger() -> None:
    found = outcome_of(result(text("It went wrong."), is_error=True), ROOM)
    assert found == Outcome((Text("It went wrong."),), is_error=True, error="It went wrong.")
    long = outcome_of(result(text("x" * 5000), is_error=True), ROOM)
    assert long.error == "x" * 500
    assert long.content == (Text("x" * 5000),)
    hiding = outcome_of(result(text("y" * 495 + "a secret"), is_error=True), ROOM, lambda said: said.replace("secret", "*"))
    assert hiding.error == "y" * 495 + "a *"
    assert hiding.content == (Text("y" * 495 + "a secret"),), "the model gets what the tool says"
    silent = outcome_of(result(types.ImageContent(data=PIXEL, mime_type="image/png"), is_error=True), ROOM)
    assert silent.error == "The tool failed."


def test_results_that_are_none() -> None:
    asked = outcome_of(types.InputRequiredResult(request_state="x"), ROOM)
    assert asked.is_error and "input_required" in str(asked.error)
    unknown = outcome_of(result(result_type="task"), ROOM)
    assert unknown.is_error and "resultType task" in str(unknown.error)


def test_what_is_too_large_is_cut_and_says_so() -> None:
    assert outcome_of(result(text("x" * 100)), 10).content == (Text("x" * 10 + "\n[cut: 100 bytes, of which 10 are here]"),)
    image = types.ImageContent(data="A" * 400, mime_type="image/png")
    noted = Text("[image: image/png, 300 bytes; not shown]")
    assert outcome_of(result(image), 100).content == (noted,)
    assert outcome_of(result(text("a"), image, text("b"), text("c")), 100).content == (
        Text("a"),
        noted,
        Text("(2 more pieces left out)"),
    )
    assert outcome_of(result(text("é")), 1).content == (Text("[cut: 2 bytes, of which 0 are here]"),)


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5), st.integers(min_value=1, max_value=50))
def test_texts_are_bounded_and_begin_as_they_were(texts: list[str], room: int) -> None:
    found = outcome_of(result(*map(text, texts)), room)
    notes = 60 + 30  # of what was cut, and of what was left out
    assert sum(len(piece.text.encode()) for piece in found.content if isinstance(piece, Text)) <= room + notes
    if sum(len(said.encode()) for said in texts) <= room:
        assert found.content == tuple(map(Text, texts))
    assert all(isinstance(piece, Text) and piece.text.strip() for piece in found.content)


def test_pieces_are_counted() -> None:
    found = outcome_of(result(text("x" * ROOM), *[text("a")] * 200_000), ROOM).content
    assert found[1:] == (Text("\n[cut: 1 bytes, of which 0 are here]".strip()), Text("(199999 more pieces left out)"))
    found = outcome_of(result(*[text("a")] * 2_000), ROOM).content
    assert found[1000:] == (Text("(1000 more pieces left out)"),)


def test_what_media_are_called_counts() -> None:
    named = types.EmbeddedResource(resource=types.BlobResourceContents(uri="file:///" + "a" * ROOM, blob="AAAA"))
    (noted,) = outcome_of(result(named), ROOM).content
    assert isinstance(noted, Text) and len(noted.text) == 500
