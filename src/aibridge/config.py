"""The configuration: one frozen tree from ``aibridge.toml`` and the environment, checked before anything starts.

In order of precedence: command line, ``AIBRIDGE_*`` variables (``__`` between levels), the file, for the providers
`anthropic` and `openai` the vendors' own variables (``ANTHROPIC_API_KEY``, ...), defaults.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from aibridge.mcp.settings import McpServer
from aibridge.providers import Provider
from aibridge.settings import (
    DatabaseSettings,
    DumpSettings,
    IdentitySettings,
    LimitSettings,
    LogSettings,
    McpServerSettings,
    McpSettings,
    ProviderName,
    ProviderSettings,
    ServerSettings,
    TracingSettings,
    UpstreamSettings,
)

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

DEFAULT_FILE: Final = Path("aibridge.toml")

# What the vendors' SDKs read, so that a shell that is set up for them is set up for us.
_VENDOR_VARIABLES: Final = {
    "anthropic": ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "https://api.anthropic.com"),
    "openai": ("OPENAI_API_KEY", "OPENAI_BASE_URL", "https://api.openai.com/v1"),
}


class ConfigurationError(Exception):
    """The configuration cannot be used. The message names each key that is wrong and what would be valid."""


class Settings(BaseSettings):
    """The whole tree."""

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix="AIBRIDGE_", env_nested_delimiter="__", frozen=True, extra="forbid", case_sensitive=False
    )

    server: ServerSettings = ServerSettings()
    log: LogSettings = LogSettings()
    database: DatabaseSettings = DatabaseSettings()
    identity: IdentitySettings = IdentitySettings()
    limits: LimitSettings = LimitSettings()
    upstream: UpstreamSettings = UpstreamSettings()
    dumps: DumpSettings = DumpSettings()
    tracing: TracingSettings = Field(default_factory=TracingSettings)
    providers: dict[ProviderName, ProviderSettings] = Field(default_factory=dict, validate_default=True)
    mcp: McpSettings = McpSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003  ours says more about what is wrong
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  the signature is pydantic's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Where values come from, the strongest first."""
        return init_settings, _Environment(settings_cls), TomlConfigSettingsSource(settings_cls)

    @field_validator("providers", mode="before")
    @classmethod
    def _with_vendors(cls, given: object) -> object:
        """The two providers that are there without being configured, and what they are where nothing else is said.

        A key from the vendor's own variable goes only where the vendor's own variable, or nobody, says: not to the server
        of a `base_url` in our configuration.
        """
        if not isinstance(given, Mapping):
            return given
        providers = {name: dict(value) if isinstance(value, Mapping) else value for name, value in given.items()}
        for name, (key_variable, url_variable, default_url) in _VENDOR_VARIABLES.items():
            provider = providers.setdefault(name, {})
            if not isinstance(provider, dict):
                continue
            provider.setdefault("kind", name)
            if "base_url" not in provider:
                provider["base_url"] = os.environ.get(url_variable) or default_url
                if key := os.environ.get(key_variable):
                    provider.setdefault("api_key", key)
        return providers

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        self.check_together()
        return self

    def check_together(self) -> None:
        """Raises ValueError for settings that do not go together."""
        for provider in self.enabled_providers():
            if self._serves(provider.base_url):
                _, variable, _ = _VENDOR_VARIABLES.get(provider.name, ("", "", ""))
                hint = f"; is {variable} set for clients in this shell?" if os.environ.get(variable) else ""
                raise ValueError(
                    f"providers.{provider.name}.base_url points at this gateway itself ({provider.base_url}){hint}"
                )
        if not self.server.on_loopback and self.identity.header is None:
            raise ValueError(
                f"{self._where} can be reached by others, so requests must be authenticated: set identity.header and"
                " identity.trusted_proxies, or listen on 127.0.0.1"
            )
        if not self.server.on_loopback and not self.identity.trusted_proxies:
            raise ValueError(
                "identity.trusted_proxies must name the networks of the proxies that may set identity.header, such as"
                f' ["10.0.0.0/8"], because {self._where} can be reached by others'
            )

    @property
    def _where(self) -> str:
        """What is listened on, for people, who may have said nothing of an address."""
        return f"{self.server.host!r} port {self.server.port} (server.host, or a socket that was handed over)"

    def _serves(self, url: str) -> bool:
        """Whether a URL leads to this very server."""
        parts = urlsplit(url)
        names = {self.server.host} if self.server.host not in _WILDCARDS else set()
        if self.server.on_loopback or not names:
            names |= _LOOPBACK_NAMES
        port = parts.port or _DEFAULT_PORTS[parts.scheme]
        return parts.hostname in names and port == self.server.port

    def enabled_providers(self) -> list[Provider]:
        """The providers that are served."""
        return [
            Provider(
                name=name,
                kind=given.kind,
                base_url=given.base_url,
                api_key=given.api_key.get_secret_value() if given.api_key else None,
                on_disconnect=given.on_disconnect,
                drain_seconds=given.drain_seconds,
                ask_for_usage=given.ask_for_usage,
                ca_file=str(given.ca_file) if given.ca_file else None,
                dump=given.dump,
                breaker=given.breaker.rules(given.kind),
                retries=given.retries.rules(),
            )
            for name, given in self.providers.items()
            if given.enabled
        ]

    def mcp_servers(self) -> dict[str, McpServer]:
        """The MCP servers whose tools are injected, by name."""
        return {name: given.server() for name, given in self.mcp.servers.items()}


_LOOPBACK_NAMES: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_WILDCARDS: Final = frozenset({"", "0.0.0.0", "::"})  # noqa: S104  to know it, not to bind to it
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class _Environment(EnvSettingsSource):
    """The variables ``AIBRIDGE_*``. What is wrong with one is said by the validation, which names the key."""

    def __call__(self) -> dict[str, Any]:
        """The values, by section. A section that there is not is an error, and not passed over."""
        sections = {name.removeprefix(_PREFIX).partition("__")[0] for name in self.env_vars if _VARIABLE.match(name)}
        return {**{section: {} for section in sections if section not in Settings.model_fields}, **super().__call__()}

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """JSON, or else the text that it is."""
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


_PREFIX: Final = "aibridge_"
# Only with a key below: Kubernetes, for one, has variables such as AIBRIDGE_PORT of its own for a service of that name.
_VARIABLE: Final = re.compile(rf"{_PREFIX}[^_]+(_[^_]+)*__.")


def load(file: Path | None = None, **overrides: Mapping[str, Any]) -> Settings:
    """Read and check the configuration: `file`, or ``aibridge.toml`` where there is one.

    `overrides` are sections with values that are stronger than all others, as ``server={"port": 9000}``. Raises
    `ConfigurationError`.
    """
    if file is not None and not file.is_file():
        raise ConfigurationError(f"there is no configuration file {file}")
    path = file or DEFAULT_FILE

    class Loaded(Settings):
        model_config = SettingsConfigDict(**{**Settings.model_config, "toml_file": path})

    try:
        loaded = Loaded(**{name: section for name, section in overrides.items() if section})  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigurationError("\n".join(map(_explain, error.errors()))) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read ({type(error).__name__})") from None
    return Settings.model_construct(**dict(loaded))  # of a class that has a name, for workers to be given it


def _explain(error: "ErrorDetails") -> str:
    """One line for one error: the key, what is wrong, what would be valid. Values are not quoted, they may be secret."""
    key = ".".join(str(part) for part in error["loc"] if part != "[key]")  # so pydantic says that a name is wrong
    if error["type"] == "extra_forbidden":
        valid = ", ".join(sorted(_keys_beside(error["loc"])))
        return f"{key}: there is no such setting; valid here: {valid}"
    if error["type"] == "missing":
        return f"{key}: is required"
    if error["type"] in ("model_type", "dict_type"):
        return f"{key}: is a section with settings of its own, not a value"
    message = error["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be").replace("a valid tuple", "a list")
    return f"{key}: {message}" if key else message


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Settings
    for part in location[:-1]:
        if model is Settings and part == "providers":
            model = ProviderSettings
        elif model is McpSettings and part == "servers":
            model = McpServerSettings
        elif part in model.model_fields:
            annotation = model.model_fields[str(part)].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                model = annotation
    return list(model.model_fields)
