"""What OpenTelemetry's own variables say about where traces go: read here, so that it is known without loading the SDK.

Source: the specification of the OTLP exporter and of the SDK's variables. What they say beside that, the SDK reads itself.
"""

from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote

_PROTOCOL: Final = "http/protobuf"
_PROTOCOL_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def traces_endpoint(variables: Mapping[str, str]) -> str | None:
    """The URL that traces are to be sent to, or None: where no endpoint is named, or where it is not to be used."""
    return _endpoint(variables) if endpoint_unused(variables) is None else None


def endpoint_unused(variables: Mapping[str, str]) -> str | None:
    """Why the endpoint that they name is not used, for people. None where it is, or where they name none.

    The SDK or the exporter of traces may be switched off, and the endpoint may speak gRPC, as those without a scheme do.
    """
    endpoint = _endpoint(variables)
    if endpoint is None:
        return None
    if disabled := sdk_disabled(variables):
        return disabled
    exporter = variables.get("OTEL_TRACES_EXPORTER")
    if exporter not in (None, "", "otlp"):
        return f"OTEL_TRACES_EXPORTER is {exporter!r}, not 'otlp'"
    name = next((name for name in _PROTOCOL_VARIABLES if variables.get(name)), None)
    if name is not None and variables[name] != _PROTOCOL:
        return f"{name} is {variables[name]!r}, and the gateway speaks {_PROTOCOL} only"
    if not endpoint.startswith(("http://", "https://")):
        return "the endpoint in OTEL_EXPORTER_OTLP_* is no http:// or https:// URL"
    return None


def sdk_disabled(variables: Mapping[str, str]) -> str | None:
    """Why there are no traces whatever else is said, for people; None where there may be."""
    return "OTEL_SDK_DISABLED is true" if variables.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" else None


def sampling(sample_ratio: float | None, variables: Mapping[str, str]) -> str:
    """How much is traced, for people: as configured, or else as they say."""
    if sample_ratio is None and (sampler := variables.get("OTEL_TRACES_SAMPLER")):
        return f"sampled by OTEL_TRACES_SAMPLER={sampler}"
    return f"sample ratio {1.0 if sample_ratio is None else sample_ratio:g}"


def traces_headers(variables: Mapping[str, str]) -> dict[str, str]:
    """The header fields that go with it: a list as in W3C Baggage, of which members without a value are passed over."""
    listed = variables.get("OTEL_EXPORTER_OTLP_TRACES_HEADERS") or variables.get("OTEL_EXPORTER_OTLP_HEADERS") or ""
    members = (member.partition("=") for member in listed.split(","))
    return {name.strip().lower(): unquote(value.strip()) for name, _, value in members if name.strip() and value.strip()}


def _endpoint(variables: Mapping[str, str]) -> str | None:
    base = variables.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").removesuffix("/")
    return variables.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or (f"{base}/v1/traces" if base else None)
