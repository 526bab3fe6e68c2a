"""What a server answers to a call, as an outcome: every kind of content becomes text or media (MCP 2025-11-25, tools).

Providers refuse empty texts, so there are none. What is too large is cut, and says so.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
from mcp_types import (
    AudioContent,
    BlobResourceContents,
    CallToolResult,
    ContentBlock,
    EmbeddedResource,
    ImageContent,
    InputRequiredResult,
    ResourceLink,
    TextContent,
    TextResourceContents,
)

from aibridge.tools import Media, MediaKind, Outcome, Text

NOTHING: Final = Text("(no output)")
_MAX_ERROR: Final = 500  # characters; the model gets the whole text
_MAX_DESCRIBED: Final = 500  # characters of what stands for media, which a server may call whatever it likes
_MAX_PIECES: Final = 1_000


def outcome_of(result: CallToolResult | InputRequiredResult, max_bytes: int, masked: Callable[[str], str] = str) -> Outcome:
    """The outcome of a call that was answered. `masked` hides secrets in what the ledger gets."""
    if isinstance(result, InputRequiredResult):
        return Outcome.failed(
            "The tool asks for input in the middle of a call (resultType input_required), which nobody here can give."
        )
    if result.result_type != "complete":
        return Outcome.failed(
            f"The tool's answer is of a kind that is not understood (resultType {result.result_type[:50]})."
        )
    pieces = [piece for block in result.content for piece in _pieces(block) if not _is_blank(piece)]
    if result.structured_content is not None and not _says(pieces, result.structured_content):
        pieces.append(Text(_json(result.structured_content)))
    content = tuple(_bounded(pieces, max_bytes)) or (NOTHING,)
    if not result.is_error:
        return Outcome(content)
    said = " ".join(piece.text for piece in content if isinstance(piece, Text)) or "The tool failed."
    return Outcome(content, is_error=True, error=masked(said)[:_MAX_ERROR])


def _pieces(block: ContentBlock) -> Iterator[Text | Media]:
    match block:
        case TextContent():
            yield Text(block.text)
        case ImageContent():
            yield Media("image", block.mime_type, block.data)
        case AudioContent():
            yield Media("audio", block.mime_type, block.data)
        case ResourceLink():
            described = f": {block.description}" if block.description else ""
            yield Text(f"Resource {block.uri} ({block.title or block.name}){described}")
        case EmbeddedResource(resource=TextResourceContents() as resource):
            yield Text(resource.text)
        case EmbeddedResource(resource=BlobResourceContents() as resource):
            media_type = resource.mime_type or "application/octet-stream"
            yield Media(_kind(media_type), media_type, resource.blob, str(resource.uri))


def _kind(media_type: str) -> MediaKind:
    match media_type.partition("/")[0].lower():
        case "image":
            return "image"
        case "audio":
            return "audio"
        case _:
            return "file"


def _is_blank(piece: Text | Media) -> bool:
    return isinstance(piece, Text) and not piece.text.strip()


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _says(pieces: list[Text | Media], structured: Any) -> bool:
    """Whether the texts are the structured content already.

    Servers should repeat it as JSON in a text, for older clients. The Python SDK and fastmcp put a result that is no object
    under "result", and a list into one text for each of its items.
    """
    texts = [piece.text for piece in pieces if isinstance(piece, Text)]
    said = [_read(text) for text in texts]
    wrapped = structured.get("result") if isinstance(structured, dict) and len(structured) == 1 else None
    if len(said) == 1 and (said[0] == structured or (wrapped is not None and wrapped in (said[0], texts[0]))):
        return True
    return wrapped is not None and wrapped in (said, texts)


def _read(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _bounded(pieces: list[Text | Media], max_bytes: int) -> Iterator[Text | Media]:
    """The pieces, as far as there is room for them, and what became of the others."""
    left = max_bytes
    for index, piece in enumerate(pieces):
        left -= _size(piece)
        if left >= 0 and index < _MAX_PIECES:
            yield piece
            continue
        rest = len(pieces) - index
        if index < _MAX_PIECES:
            yield _cut(piece, left + _size(piece))
            rest -= 1
        if rest:
            yield Text(f"({rest} more pieces left out)")
        return


def _size(piece: Text | Media) -> int:
    if isinstance(piece, Text):
        return len(piece.text.encode())
    return len(piece.data) + len((piece.media_type + (piece.name or "")).encode())


def _cut(piece: Text | Media, room: int) -> Text:
    if isinstance(piece, Media):
        return Text(piece.described[:_MAX_DESCRIBED])
    kept = piece.text.encode()[:room].decode(errors="ignore")
    return Text(f"{kept}\n[cut: {_size(piece)} bytes, of which {len(kept.encode())} are here]".lstrip())
