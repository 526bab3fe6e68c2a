"""The sections of the configuration: their keys, defaults and meanings, and what a value must be (docs/configuration.md)."""

import ipaddress
import os
import re
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_serializer,
    field_validator,
    model_validator,
)

from aibridge.breakers import FAILURES, BreakerRules
from aibridge.dumps import MAX_BYTES, MAX_DUMP_BYTES, MAX_HOURS
from aibridge.errors import ProviderKind
from aibridge.ledger import WhenUnrecordable
from aibridge.limits import MAX_BODY_BYTES, MAX_HEADER_BYTES, Limits
from aibridge.loglines import LogFormat, LogLevel
from aibridge.mcp.settings import McpServer, check_name as check_server_name
from aibridge.otelenv import endpoint_unused, sampling, sdk_disabled, traces_endpoint, traces_headers
from aibridge.providers import OnDisconnect, check_base_url, check_name
from aibridge.retries import RetryRules
from aibridge.wire.turns import UsagePolicy

_SQLITE: Final = "sqlite:///"
_NO_PATH: Final = re.compile(r"https?://[^/?#]+/?")


def _resolve_secret(value: object) -> object:
    """A secret may be given as it is, or as ``{ env = "VARIABLE" }`` or ``{ file = "PATH" }``."""
    match value:
        case SecretStr():
            return value
        case str():
            secret = value
        case {"env": str(name), **rest} if not rest:
            if not name.isidentifier():  # perhaps the secret itself, so it is not quoted
                raise ValueError("env must be the name of an environment variable")
            secret = os.environ.get(name, "")
            if not secret:
                raise ValueError(f"the environment variable {name} is not set")
        case {"file": str(name), **rest} if not rest:
            try:
                secret = Path(name).read_text()
            except (OSError, UnicodeError) as error:
                raise ValueError(f"the file {name} cannot be read ({type(error).__name__})") from None
        case _:
            raise ValueError('a secret is a string, { env = "VARIABLE" } or { file = "PATH" }')
    secret = secret.strip()
    if not secret.isprintable() or not secret:
        raise ValueError("a secret must not be empty, or hold line breaks or other control characters")
    return secret


def _checked_by(check: Callable[[str], None]) -> Callable[[str], str]:
    def checked(name: str) -> str:
        check(name)
        return name

    return checked


Secret = Annotated[SecretStr, BeforeValidator(_resolve_secret)]

ProviderName = Annotated[str, AfterValidator(_checked_by(check_name))]
McpServerName = Annotated[str, AfterValidator(_checked_by(check_server_name))]


def _listed(value: object) -> object:
    """A list, or in one string separated by commas, which is easier to write in an environment variable."""
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


Listed = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Statuses = Annotated[tuple[int, ...], BeforeValidator(_listed)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ServerSettings(_Section):
    """``[server]``"""

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8080, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    allowed_hosts: Listed = Field(
        default=(), description="names under which a server on loopback may be addressed, beside localhost and its address"
    )
    workers: int = Field(default=1, ge=1, description="processes that serve, such as one for each core")
    shutdown_grace: float = Field(
        default=20.0, ge=0, description="seconds that responses under way get to end after SIGTERM"
    )
    drain_delay: float = Field(
        default=0.0, ge=0, description="seconds to let clients in after SIGTERM, while /readyz says that the server stops"
    )
    worker_timeout: float = Field(
        default=60.0, gt=0, description="seconds without an answer after which a worker is taken for hung, and replaced"
    )

    request_timeout: float = Field(
        default=60.0, gt=0, description="seconds that a client may take to send a request's head, and each piece of its body"
    )
    keep_alive_timeout: float = Field(default=75.0, gt=0, description="seconds that a connection may be without a request")
    write_timeout: float = Field(
        default=300.0, gt=0, description="seconds after which a client that reads nothing of its response is given up"
    )

    @field_validator("allowed_hosts")
    @classmethod
    def _are_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
                raise ValueError(f"{name!r} is not a host name such as gateway.internal; ports do not matter")
        return names

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class LogSettings(_Section):
    """``[log]``"""

    format: LogFormat = Field(
        default="auto", description="of lines on standard error: for people, for programs, or auto, by who reads"
    )
    level: LogLevel = Field(default="info", description="the least level of lines that are written")
    interceptions: bool = Field(default=True, description="a line when a request starts and one when it has ended")
    content: bool = Field(default=False, description="with providers' errors in full, which may quote what they were sent")


class DatabaseSettings(_Section):
    """``[database]``"""

    url: str = Field(default="sqlite:///aibridge.db", description="sqlite:///relative.db or sqlite:////absolute.db")
    when_unavailable: WhenUnrecordable = Field(
        default="refuse",
        description="what to do when neither database nor spool take records: refuse requests, or continue and count",
    )

    @field_validator("url")
    @classmethod
    def _only_sqlite(cls, url: str) -> str:
        if not url.startswith(_SQLITE) or url == _SQLITE:
            raise ValueError("only sqlite:///PATH is supported")
        return url

    @property
    def path(self) -> Path:
        """The database file."""
        return Path(self.url.removeprefix(_SQLITE))


class BreakerSettings(_Section):
    """``[providers.NAME.breaker]``"""

    enabled: bool = Field(default=False, description="give the provider a rest when it fails")
    statuses: Statuses | None = Field(
        default=None, description="HTTP statuses that are failures, from 500; by default those of the provider's kind"
    )
    threshold: int = Field(default=5, ge=1, description="failures in a row that open the breaker")
    open_seconds: float = Field(default=30.0, gt=0, description="seconds before requests are let through to try")
    probes: int = Field(default=1, ge=1, description="how many of those at a time, and how many have to succeed")

    @field_validator("statuses")
    @classmethod
    def _are_the_providers_fault(cls, statuses: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if statuses is not None and not all(500 <= status <= 599 for status in statuses):
            raise ValueError("must be from 500 to 599: a status below is about one request, and a breaker is for all")
        return statuses

    def rules(self, kind: ProviderKind) -> BreakerRules | None:
        """When breakers of a provider open and close; None where there are none."""
        if not self.enabled:
            return None
        statuses = FAILURES[kind] if self.statuses is None else frozenset(self.statuses)
        return BreakerRules(statuses, self.threshold, self.open_seconds, self.probes)


class RetrySettings(_Section):
    """``[providers.NAME.retries]``"""

    attempts: int = Field(default=0, ge=0, le=10, description="how often a request is sent again at most")
    statuses: Statuses = Field(default=(), description="HTTP statuses for which it is, beside connections that failed")
    max_delay: float = Field(default=10.0, gt=0, description="seconds to wait for that at most")

    @field_validator("statuses")
    @classmethod
    def _are_errors(cls, statuses: tuple[int, ...]) -> tuple[int, ...]:
        if not all(400 <= status <= 599 for status in statuses):
            raise ValueError("must be from 400 to 599")
        return statuses

    def rules(self) -> RetryRules:
        """When a request is sent again."""
        return RetryRules(self.attempts, frozenset(self.statuses), self.max_delay)


class ProviderSettings(_Section):
    """``[providers.NAME]``"""

    kind: ProviderKind = Field(description="the protocol that the server speaks")
    base_url: str = Field(description="as a client would set it; of kind openai it includes /v1")
    api_key: Secret | None = Field(default=None, description="sent instead of the client's own credential")
    on_disconnect: OnDisconnect = Field(
        default="cancel", description="when the client goes: stop the provider, or read on for exact usage"
    )
    drain_seconds: float = Field(default=300.0, gt=0, description="how long to read on for after the client has gone")
    ask_for_usage: bool = Field(default=True, description="add stream_options.include_usage to streamed Chat requests")
    ca_file: Path | None = Field(default=None, description="PEM file with certificates to trust beside the system's")
    dump: bool = Field(
        default=False, description="write its traffic to files, for debugging: with prompts and answers in clear"
    )
    enabled: bool = Field(default=True, description="false takes the provider away")
    breaker: BreakerSettings = BreakerSettings()
    retries: RetrySettings = RetrySettings()

    @field_validator("base_url")
    @classmethod
    def _is_a_base_url(cls, url: str) -> str:
        check_base_url(url)
        return url

    @field_validator("ca_file")
    @classmethod
    def _holds_certificates(cls, path: Path | None) -> Path | None:
        if path is None:
            return None
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        except FileNotFoundError:
            raise ValueError(f"there is no file {path}") from None
        except ssl.SSLError:
            raise ValueError(f"the file {path} holds no certificates in PEM that can be read") from None
        except OSError as error:
            raise ValueError(f"the file {path} cannot be read ({type(error).__name__})") from None
        return path


class IdentitySettings(_Section):
    """``[identity]``"""

    header: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9-]+$", description="request header in which a trusted proxy names the user"
    )
    trusted_proxies: Listed = Field(
        default=(), description="networks (CIDR) from which that header is believed; loopback where none are given"
    )

    @model_validator(mode="after")
    def _has_a_header_to_believe(self) -> Self:
        if self.trusted_proxies and self.header is None:
            raise ValueError("trusted_proxies does nothing without header, which names the user; set that, too")
        return self

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            try:
                ipaddress.ip_network(network)
            except ValueError:
                raise ValueError(f"{network!r} is not a network such as 10.0.0.0/8 or 192.168.1.7/32") from None
        return networks


class LimitSettings(_Section):
    """``[limits]``"""

    max_body_bytes: int = Field(default=MAX_BODY_BYTES, gt=0, description="largest request body")
    max_header_bytes: int = Field(default=MAX_HEADER_BYTES, gt=0, description="largest request head")
    max_concurrent: int | None = Field(default=None, ge=1, description="intercepted requests under way, of all actors")
    max_concurrent_per_actor: int | None = Field(
        default=None, ge=1, description="intercepted requests under way, of one actor"
    )
    requests_per_minute: int | None = Field(default=None, ge=1, description="requests to providers, of one actor")

    def limits(self) -> Limits:
        """What the bridge takes at most."""
        return Limits(**dict(self))


class UpstreamSettings(_Section):
    """``[upstream]``"""

    connect_timeout: float = Field(default=10.0, gt=0, description="seconds to connect to a provider")
    first_byte_timeout: float | None = Field(
        default=None, gt=0, description="seconds for the head of a response to come; by default those of idle_timeout"
    )
    idle_timeout: float = Field(default=600.0, gt=0, description="seconds without a byte after which a provider is given up")


class DumpSettings(_Section):
    """``[dumps]``"""

    directory: Path = Field(
        default=Path("aibridge-dumps"), description="where the traffic of providers with dump = true goes"
    )
    max_dump_bytes: int = Field(default=MAX_DUMP_BYTES, gt=0, description="how much of the bodies of one call is kept")
    max_bytes: int = Field(default=MAX_BYTES, gt=0, description="size of all dumps, the oldest go first")
    max_hours: float = Field(default=MAX_HOURS, gt=0, description="age at which dumps are deleted")


class TracingSettings(_Section):
    """``[tracing]``"""

    endpoint: str | None = Field(default=None, description="URL of an OTLP/HTTP receiver; without one there are no traces")
    headers: dict[str, Secret] = Field(default_factory=dict, description="sent to the receiver with each request")
    sample_ratio: float | None = Field(
        default=None, ge=0, le=1, description="of what does not belong to a client's trace, how much is traced"
    )
    service_name: str | None = Field(default=None, min_length=1, description="what the gateway is called in traces")
    content: bool = Field(default=False, description="with prompts, thoughts, the arguments of tools, and errors' words")

    @model_validator(mode="before")
    @classmethod
    def _as_the_environment_says(cls, given: object) -> object:
        """Where nothing else is said, OpenTelemetry's own variables say where traces go. Their headers go there only."""
        if not isinstance(given, Mapping):
            return given
        if isinstance(endpoint := given.get("endpoint"), str) and _NO_PATH.fullmatch(endpoint):
            return {**given, "endpoint": f"{endpoint.removesuffix('/')}/v1/traces"}
        if "endpoint" not in given and (endpoint := traces_endpoint(os.environ)):
            headers = given.get("headers", {})
            if isinstance(headers, Mapping):
                headers = {**traces_headers(os.environ), **headers}
            return {**given, "endpoint": endpoint, "headers": headers}
        return given

    @field_validator("endpoint")
    @classmethod
    def _is_a_whole_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if "@" in url:
            raise ValueError("must not hold credentials; use headers")
        check_base_url(url)
        return url

    @field_validator("headers")
    @classmethod
    def _have_names(cls, headers: dict[str, Secret]) -> dict[str, Secret]:
        for name in headers:
            if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
                raise ValueError(f"{name!r} is not the name of a header field")
        return headers

    @property
    def unused(self) -> str | None:
        """Why no traces are sent though an endpoint is named, for people; None where they are, or where none is."""
        return endpoint_unused(os.environ) if self.endpoint is None else sdk_disabled(os.environ)

    @property
    def destination(self) -> str | None:
        """Where traces go and how many, for people: scheme and host, no path, which may be a key. None without traces."""
        if self.endpoint is None or self.unused is not None:
            return None
        parts = urlsplit(self.endpoint)
        return f"{parts.scheme}://{parts.netloc}, {sampling(self.sample_ratio, os.environ)}"


class McpServerSettings(_Section):
    """``[mcp.servers.NAME]``"""

    url: str | None = Field(default=None, repr=False, description="where the server is reached: streamable HTTP, or SSE")
    command: tuple[str, ...] = Field(
        default=(), repr=False, description="program and arguments of a server to start and talk to on stdio, as a list"
    )
    transport: Literal["http", "sse"] = Field(default="http", description="of a server with a url")
    headers: dict[str, Secret] = Field(default_factory=dict, description="sent with each request to a url")
    env: dict[str, Secret] = Field(default_factory=dict, description="environment of a command, beside the basic variables")
    allow: tuple[str, ...] = Field(
        default=(), description="regular expressions over the tools' own names; where there are some, others are left out"
    )
    deny: tuple[str, ...] = Field(default=(), description="regular expressions for tools to leave out; stronger than allow")
    read_only: bool = Field(default=False, description="leave out tools that the server does not annotate as read-only")
    on_change: Literal["report", "withhold"] = Field(
        default="report",
        description="what to do about a tool whose definition has changed since it was approved: report, or withhold it",
    )
    start_timeout: float = Field(default=10.0, gt=0, description="seconds that starting waits for the server's tools")
    call_timeout: float = Field(default=60.0, gt=0, description="seconds that a call may take in all")
    refresh_seconds: float = Field(default=300.0, gt=0, description="how often the tools are listed anew")
    max_concurrent_calls: int = Field(default=8, ge=1, description="calls at one time; others wait")
    max_result_bytes: int = Field(default=1_000_000, gt=0, description="size at which results are cut")
    max_tools: int = Field(default=200, ge=1, description="tools that are offered; those behind them are left out")

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        _ = self.server()
        return self

    @field_serializer("url", when_used="json")
    def _shown_url(self, url: str | None) -> str | None:
        return url and self.server().where

    @field_serializer("command", when_used="json")
    def _shown_command(self, _: tuple[str, ...]) -> tuple[str, ...]:
        return self.server().shown_command

    def server(self) -> McpServer:
        """The server that this describes. Raises ValueError where there can be none such."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        for secrets in ("headers", "env"):
            given[secrets] = {name: value.get_secret_value() for name, value in given[secrets].items()}
        return McpServer(**given)


class McpSettings(_Section):
    """``[mcp]``"""

    usage: UsagePolicy = Field(
        default="sum",
        description="what a response with several turns reports as its usage: the sum, or the last turn's input and the"
        " summed output",
    )
    max_turns: int = Field(default=32, ge=1, description="requests to the provider for one request of a client")
    max_seconds: float = Field(
        default=600.0, gt=0, description="seconds after which no more tools are called for one request of a client"
    )
    keep_alive_seconds: float = Field(default=15.0, gt=0, description="how long a client's stream may be silent")
    skip_models: tuple[str, ...] = Field(
        default=(), description="regular expressions for models that get no tools, such as small ones for side jobs"
    )
    history_days: float = Field(
        default=30.0, gt=0, description="how long after its last use the hidden part of a conversation is kept"
    )
    history_max_bytes: int = Field(default=2**30, gt=0, description="how much of it is kept, the oldest goes first")
    servers: dict[McpServerName, McpServerSettings] = Field(default_factory=dict)

    @field_validator("skip_models")
    @classmethod
    def _are_expressions(cls, expressions: tuple[str, ...]) -> tuple[str, ...]:
        for expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{expression!r} is not a regular expression: {error}") from None
        return expressions
