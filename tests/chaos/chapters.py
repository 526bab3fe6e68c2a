"""All chapters, in the order of the table."""

from typing import Final

from .clocks import CLOCKS
from .crowds import CROWDS
from .databases import DATABASES
from .excess import EXCESS
from .lies import LYING
from .operation import OPERATION, OVERLOAD, RETRYING
from .providers import BREAKING_OFF, STALLING
from .scenario import Chapter
from .tools import EXCESSIVE, LIARS

OF_OTHERS: Final[tuple[Chapter, ...]] = (BREAKING_OFF, STALLING, LYING, EXCESS, OVERLOAD, RETRYING, LIARS, EXCESSIVE)
"""Of whom a gateway asks something."""

OF_THE_MACHINE: Final[tuple[Chapter, ...]] = (DATABASES, CLOCKS, CROWDS, OPERATION)
"""That it runs on, and of its clients and operators."""

CHAPTERS: Final = (*OF_OTHERS, *OF_THE_MACHINE)
