"""The token usage of several turns as one usage object, in the provider's own shape. Facts from wire.md A8, B4, C4, D5."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from aibridge.wire.reading import Members, is_null, items, members, number
from aibridge.wire.turns import UsagePolicy

# The input side of the three protocols, with its breakdowns. All other counters add up over turns under both policies.
_INPUT: Final = frozenset(
    {
        "input_tokens",
        "cache_read_input_tokens",
        "cache_creation_input_tokens",
        "cache_creation",
        "input_tokens_details",
        "prompt_tokens",
        "prompt_tokens_details",
        "prompt_cache_hit_tokens",
        "prompt_cache_miss_tokens",
    }
)
_TOTALS: Final = (("input_tokens", "output_tokens"), ("prompt_tokens", "completion_tokens"))


def merged_usage(usages: Sequence[bytes], policy: UsagePolicy) -> bytes:
    """One usage object, as JSON text, for those of the turns in their order; a single one stays as it is.

    Counters are summed, or taken from the last turn, by the policy; lists (``iterations``) are joined; anything else is the
    last turn's.
    """
    if len(usages) == 1:
        return usages[0]
    merged = _merged([members(usage) for usage in usages], policy)
    for parts in _TOTALS:
        if "total_tokens" in merged and all(part in merged for part in parts):
            merged["total_tokens"] = sum(_count(merged[part]) for part in parts)
    return msgspec.json.encode(merged)


def _merged(usages: Sequence[Members], policy: UsagePolicy) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for usage in usages for name in usage):
        given = [usage[name] for usage in usages if name in usage and not is_null(usage[name])]
        if policy == "last" and name in _INPUT:
            merged |= {name: usages[-1][name]} if name in usages[-1] else {}
        elif not given:
            merged[name] = None
        elif all(number(raw) is not None for raw in given):
            merged[name] = sum(number(raw) or 0 for raw in given)
        elif all(bytes(raw).startswith(b"{") for raw in given):
            merged[name] = _merged([members(raw) for raw in given], policy)
        elif all(bytes(raw).startswith(b"[") for raw in given):
            merged[name] = [entry for raw in given for entry in items(raw)]
        else:
            merged[name] = given[-1]
    return merged


def _count(value: Any) -> int | float:
    return value if isinstance(value, int | float) else number(value) or 0
