"""What a bridge takes at most. Pure."""

from typing import Final

import msgspec

MAX_BODY_BYTES: Final = 32 * 1024 * 1024
MAX_HEADER_BYTES: Final = 64 * 1024


class Limits(msgspec.Struct, frozen=True):
    """The limits of a bridge. Sizes are in bytes."""

    max_body_bytes: int = MAX_BODY_BYTES
    max_header_bytes: int = MAX_HEADER_BYTES
