"""What goes wrong on the way to a provider, in our words: foreign exceptions are translated here, once."""

import os
import ssl
from typing import Final

from aibridge.errors import UpstreamError, UpstreamTimeout

# How far it came, which begins a message: what ended it follows, or that it took too long.
UNREACHABLE: Final = "The provider could not be reached"
UNTAKEN: Final = "The provider did not take the request"
UNANSWERED: Final = "The provider gave no answer"
BROKEN_OFF: Final = "The provider's response broke off"
UNSENT: Final = "The request could not be sent"


def late(what: str) -> UpstreamTimeout:
    """That something took longer than configured: `what` tells which of the timeouts it was."""
    return UpstreamTimeout(f"{what}: nothing came in time." if what == BROKEN_OFF else f"{what} in time.")


def translated(error: BaseException, what: str) -> UpstreamError:
    """A foreign exception as one of ours. `what` begins its message."""
    match error:
        case UpstreamError():
            return error
        case TimeoutError():
            return late(what)
        case ssl.SSLCertVerificationError():
            return UpstreamError(f"{what}: its certificate is not trusted ({error.verify_message}).")
        case ssl.SSLError():  # its errno is none of the system's
            return UpstreamError(f"{what}: TLS failed ({error.reason}).")
        case ConnectionError(errno=None):
            return UpstreamError(f"{what}: it closed the connection.")
        case OSError(errno=int(number)) if number > 0:
            return UpstreamError(f"{what}: {os.strerror(number)}.")  # its own text holds the address
        case OSError(strerror=str(reason)):
            return UpstreamError(f"{what}: {reason}.")
    return UpstreamError(f"{what}: {type(error).__name__}.")
