"""What OpenTelemetry's own variables say about where traces go: read here, so that it is known without loading the SDK.

Source: the specification of the OTLP exporter and of the SDK's variables. What they say beside that, the SDK reads itself.
"""

from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote

_PROTOCOL: Final = "http/protobuf"


def traces_endpoint(variables: Mapping[str, str]) -> str | None:
    """The URL that traces are to be sent to, or None: where there is no endpoint, where the SDK or the exporter of traces is
    switched off, or where the endpoint is said to speak gRPC, as those without a scheme do.
    """
    if variables.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if variables.get("OTEL_TRACES_EXPORTER") not in (None, "", "otlp"):
        return None
    protocol = variables.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or variables.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol not in (None, "", _PROTOCOL):
        return None
    base = variables.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").removesuffix("/")
    endpoint = variables.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or f"{base}/v1/traces"
    return endpoint if endpoint.startswith(("http://", "https://")) else None


def traces_headers(variables: Mapping[str, str]) -> dict[str, str]:
    """The header fields that go with it: a list as in W3C Baggage, of which members without a value are passed over."""
    listed = variables.get("OTEL_EXPORTER_OTLP_TRACES_HEADERS") or variables.get("OTEL_EXPORTER_OTLP_HEADERS") or ""
    members = (member.partition("=") for member in listed.split(","))
    return {name.strip().lower(): unquote(value.strip()) for name, _, value in members if name.strip() and value.strip()}
