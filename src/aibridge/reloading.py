"""A configuration that is read anew while the gateway runs: what of it can be taken over, and what needs a restart."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from aibridge.config import ConfigurationError, Settings

logger = logging.getLogger(__name__)

Load = Callable[[], Settings]
"""Reads the configuration. Raises `ConfigurationError`."""

# What can change while the gateway runs. All else stays as it was: a socket is bound, a database is open.
_SECTIONS: Final = ("identity", "limits", "mcp", "providers")
_OF_LOG: Final = ("level",)
_OF_SERVER: Final = ("allowed_hosts", "drain_delay", "shutdown_grace", "worker_timeout")
_SEE_LOG: Final = "the log says why; the old one still holds"


class Configuration:
    """The settings that hold, which can be read anew."""

    def __init__(self, settings: Settings, load: Load) -> None:
        self.settings = settings
        self.notes: tuple[str, ...] = ()
        """What an operator should know of the last attempt to read them."""
        self.attempts = 0
        """How often they were read anew, whatever came of it."""
        self._load = load
        self._pending: tuple[str, ...] = ()

    async def reload(self, take_over: Callable[[Settings], Awaitable[None]]) -> None:
        """Read the configuration, and have what can be changed of it taken over. Where that fails, the old one still holds.

        Does not raise: log and notes say what is wrong.
        """
        when = datetime.now(UTC).isoformat(timespec="seconds")
        self.attempts += 1
        try:
            settings, fixed = renewed(self.settings, await asyncio.to_thread(self._load))
            await take_over(settings)
        except ConfigurationError as error:
            for line in str(error).splitlines():
                logger.error("the configuration cannot be used: %s", line)  # noqa: TRY400  it says it all
            logger.error("not reloaded, the old configuration still holds")  # noqa: TRY400
            self.notes = (f"the configuration could not be reloaded at {when}, {_SEE_LOG}", *self._pending)
        except Exception:
            logger.exception("not reloaded, the old configuration still holds: the new one could not be taken over")
            self.notes = (f"the configuration could not be taken over at {when}, {_SEE_LOG}", *self._pending)
        else:
            self.settings = settings
            self.notes = self._pending = (f"changed, and needs a restart: {', '.join(fixed)}",) if fixed else ()
            logger.info("the configuration was reloaded")
            if fixed:
                logger.warning("changes that need a restart: %s", ", ".join(fixed))

    def noted(self, status: str) -> str:
        """A status, with the notes behind it."""
        return "; ".join((status, *self.notes))


def renewed(old: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """The old settings with what can be taken over of the new ones, and the keys that differ all the same.

    Raises `ConfigurationError` where the two do not go together, such as when an address is kept that strangers reach and
    the identity is taken away.
    """
    server = old.server.model_copy(update={key: getattr(new.server, key) for key in _OF_SERVER})
    log = old.log.model_copy(update={key: getattr(new.log, key) for key in _OF_LOG})
    settings = old.model_copy(
        update={"server": server, "log": log, **{section: getattr(new, section) for section in _SECTIONS}}
    )
    try:
        settings.check_together()
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    return settings, sorted(_differing(settings.model_dump(), new.model_dump(), ()))


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    for key in one.keys() | other.keys():
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from _differing(mine, theirs, (*path, key))
        elif mine != theirs:
            yield ".".join((*path, key))
