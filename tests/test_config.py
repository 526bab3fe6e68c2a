"""The configuration.

Truth: design.md section 3 for names, precedence and secrets; the rest is our choice (docs/configuration.md).
"""

import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from aibridge.breakers import BreakerRules
from aibridge.check import describe
from aibridge.config import ConfigurationError, Settings, load
from aibridge.retries import RetryRules
from aibridge.settings import McpServerSettings, ProviderSettings
from tests.support.tls import Authority

DOCUMENTATION = Path(__file__).parent.parent / "docs" / "configuration.md"
SECRET = "sk-very-secret-9f8e7d6c"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and an environment without settings."""
    monkeypatch.chdir(tmp_path)
    for name in list(_environment()):
        monkeypatch.delenv(name)
    return tmp_path


def _environment() -> Iterator[str]:
    return (name for name in os.environ if name.upper().startswith(("AIBRIDGE_", "ANTHROPIC_", "OPENAI_", "OTEL_")))


def configured(toml: str) -> Settings:
    Path("aibridge.toml").write_text(toml)
    return load()


def refusal(toml: str = "", env: Mapping[str, str] | None = None, server: Mapping[str, Any] | None = None) -> str:
    """Why a configuration cannot be used."""
    Path("aibridge.toml").write_text(toml)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        with pytest.raises(ConfigurationError) as caught:
            load(server=server or {})
    message = str(caught.value)
    assert SECRET not in message and SECRET not in repr(caught.value)
    assert caught.value.__cause__ is None and "pydantic" not in message
    return message


def value_of(settings: Settings, key: str) -> Any:
    found: Any = settings
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


def all_keys(model: type[BaseModel] = Settings, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Each setting with its field."""
    for name, field in model.model_fields.items():
        if name == "providers":
            yield from all_keys(ProviderSettings, ("providers", "NAME"))
        elif name == "servers":
            yield from all_keys(McpServerSettings, (*path, name, "NAME"))
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from all_keys(field.annotation, (*path, name))
        else:
            yield ".".join((*path, name)), field


# ---- every setting, by file and by variable ----

# key: TOML, variable, what it comes to. A provider that is complete beside the key under test stands in VLLM.
SETTINGS: dict[str, tuple[str, str, Any]] = {
    "server.host": ('"::1"', "::1", "::1"),
    "server.port": ("9000", "9000", 9000),
    "server.allowed_hosts": ('["a.example", "b"]', "a.example, b", ("a.example", "b")),
    "server.workers": ("4", "4", 4),
    "server.shutdown_grace": ("1.5", "1.5", 1.5),
    "log.format": ('"json"', "json", "json"),
    "log.level": ('"warning"', "warning", "warning"),
    "log.interceptions": ("false", "false", False),
    "log.content": ("true", "true", True),
    "server.drain_delay": ("2.5", "2.5", 2.5),
    "server.worker_timeout": ("30", "30", 30.0),
    "server.request_timeout": ("5", "5", 5.0),
    "server.keep_alive_timeout": ("6", "6", 6.0),
    "server.write_timeout": ("7", "7", 7.0),
    "database.url": ('"sqlite:////x/y.db"', "sqlite:////x/y.db", "sqlite:////x/y.db"),
    "database.when_unavailable": ('"continue"', "continue", "continue"),
    "identity.header": ('"X-User"', "X-User", "X-User"),
    "identity.trusted_proxies": ('["10.0.0.0/8", "fd00::/8"]', '["10.0.0.0/8", "fd00::/8"]', ("10.0.0.0/8", "fd00::/8")),
    "limits.max_body_bytes": ("1000", "1000", 1000),
    "limits.max_header_bytes": ("2000", "2000", 2000),
    "limits.max_concurrent": ("100", "100", 100),
    "limits.max_concurrent_per_actor": ("10", "10", 10),
    "limits.requests_per_minute": ("60", "60", 60),
    "upstream.first_byte_timeout": ("30", "30", 30.0),
    "upstream.connect_timeout": ("0.5", "0.5", 0.5),
    "upstream.idle_timeout": ("60", "60", 60.0),
    "dumps.directory": ('"/x/y"', "/x/y", Path("/x/y")),
    "dumps.max_dump_bytes": ("1000", "1000", 1000),
    "dumps.max_bytes": ("2000", "2000", 2000),
    "dumps.max_hours": ("0.5", "0.5", 0.5),
    "providers.vllm.kind": ('"anthropic"', "anthropic", "anthropic"),
    "providers.vllm.base_url": ('"https://h:1/x/v1"', "https://h:1/x/v1", "https://h:1/x/v1"),
    "providers.vllm.api_key": ('"key"', "key", "key"),
    "providers.vllm.on_disconnect": ('"drain"', "drain", "drain"),
    "providers.vllm.drain_seconds": ("7", "7", 7.0),
    "providers.vllm.ask_for_usage": ("false", "false", False),
    "providers.vllm.ca_file": ('"ca.pem"', "ca.pem", Path("ca.pem")),
    "providers.vllm.dump": ("true", "true", True),
    "providers.vllm.enabled": ("false", "false", False),
    "tracing.endpoint": ('"http://c:4318"', "http://c:4318", "http://c:4318/v1/traces"),
    "tracing.headers": ('{ X-Key = "key" }', '{"X-Key": "key"}', {"X-Key": "key"}),
    "tracing.sample_ratio": ("0.5", "0.5", 0.5),
    "tracing.service_name": ('"gateway"', "gateway", "gateway"),
    "tracing.content": ("true", "true", True),
    "providers.vllm.breaker.enabled": ("true", "true", True),
    "providers.vllm.breaker.statuses": ("[500, 502]", "500, 502", (500, 502)),
    "providers.vllm.breaker.threshold": ("3", "3", 3),
    "providers.vllm.breaker.open_seconds": ("5", "5", 5.0),
    "providers.vllm.breaker.probes": ("2", "2", 2),
    "providers.vllm.retries.attempts": ("2", "2", 2),
    "providers.vllm.retries.statuses": ("[429, 529]", "[429, 529]", (429, 529)),
    "providers.vllm.retries.max_delay": ("4", "4", 4.0),
    "mcp.usage": ('"last"', "last", "last"),
    "mcp.max_turns": ("3", "3", 3),
    "mcp.max_seconds": ("30", "30", 30.0),
    "mcp.keep_alive_seconds": ("5", "5", 5.0),
    "mcp.skip_models": ('["haiku"]', '["haiku"]', ("haiku",)),
    "mcp.history_days": ("7", "7", 7.0),
    "mcp.history_max_bytes": ("1000", "1000", 1000),
    "mcp.servers.time.url": ('"https://h/mcp"', "https://h/mcp", "https://h/mcp"),
    "mcp.servers.time.command": ('["python", "-m", "x"]', '["python", "-m", "x"]', ("python", "-m", "x")),
    "mcp.servers.time.transport": ('"sse"', "sse", "sse"),
    "mcp.servers.time.headers": ('{ X-Key = "key" }', '{"X-Key": "key"}', {"X-Key": "key"}),
    "mcp.servers.time.env": ('{ TOKEN = "key" }', '{"TOKEN": "key"}', {"TOKEN": "key"}),
    "mcp.servers.time.allow": ('["^get_", "a,b"]', '["^get_", "a,b"]', ("^get_", "a,b")),
    "mcp.servers.time.deny": ('["delete"]', '["delete"]', ("delete",)),
    "mcp.servers.time.read_only": ("true", "true", True),
    "mcp.servers.time.on_change": ('"withhold"', "withhold", "withhold"),
    "mcp.servers.time.start_timeout": ("1", "1", 1.0),
    "mcp.servers.time.call_timeout": ("2", "2", 2.0),
    "mcp.servers.time.refresh_seconds": ("3", "3", 3.0),
    "mcp.servers.time.max_concurrent_calls": ("4", "4", 4),
    "mcp.servers.time.max_result_bytes": ("5", "5", 5),
    "mcp.servers.time.max_tools": ("6", "6", 6),
}
# What makes a server complete beside the key under test: those of a `command` need one, the others a `url`.
OF_A_COMMAND = {"command", "env"}
VLLM = {"kind": "openai", "base_url": "http://gpu:8000/v1"}


def test_the_table_has_every_setting() -> None:
    names = {key.replace("vllm", "NAME").replace("servers.time", "servers.NAME") for key in SETTINGS}
    assert names == {key for key, _ in all_keys()}


def _beside(section: str, name: str) -> dict[str, Any]:
    """What a section needs to be complete beside a key. A section of a provider's stands in that provider's."""
    if section.startswith("providers.vllm."):
        return {f"providers.vllm.{key}": value for key, value in VLLM.items()}
    return {f"{section}.{key}": value for key, value in _keys_beside(section, name).items()}


def _keys_beside(section: str, name: str) -> dict[str, Any]:
    if section == "providers.vllm":
        return {key: value for key, value in VLLM.items() if key != name}
    if section == "mcp.servers.time" and name not in ("url", "command"):
        return {"command": ["python"]} if name in OF_A_COMMAND else {"url": "http://h/mcp"}
    return {"header": "X-User"} if name == "trusted_proxies" else {}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value.get_secret_value() if hasattr(value, "get_secret_value") else value


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("authority"))


@pytest.mark.parametrize("key", SETTINGS)
def test_a_setting_by_file(key: str, authority: Authority) -> None:
    literal, _, expected = SETTINGS[key]
    shutil.copy(authority.ca_file, "ca.pem")
    section, _, name = key.rpartition(".")
    beside = [f"{key} = {json.dumps(value)}" for key, value in _beside(section, name).items()]
    assert _plain(value_of(configured("\n".join([f"{key} = {literal}", *beside])), key)) == expected


@pytest.mark.parametrize("key", SETTINGS)
def test_a_setting_by_variable(key: str, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    _, text, expected = SETTINGS[key]
    shutil.copy(authority.ca_file, "ca.pem")
    section, _, name = key.rpartition(".")
    for other, value in _beside(section, name).items():
        given = value if isinstance(value, str) else json.dumps(value)
        monkeypatch.setenv(f"AIBRIDGE_{other}".upper().replace(".", "__"), given)
    monkeypatch.setenv("AIBRIDGE_" + key.upper().replace(".", "__"), text)
    assert _plain(value_of(load(), key)) == expected


@pytest.mark.parametrize("text", ["a.example,b", " a.example , b ", '["a.example","b"]', "a.example,b,"])
def test_lists_in_a_variable(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIBRIDGE_SERVER__ALLOWED_HOSTS", text)
    assert load().server.allowed_hosts == ("a.example", "b")


@pytest.mark.parametrize("text", ["12345", "true", "null", "1e5", '"q"', "[x]"])
def test_a_key_in_a_variable_is_taken_literally(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIBRIDGE_PROVIDERS__ANTHROPIC__API_KEY", text)
    assert _plain(load().providers["anthropic"].api_key) == text


def test_the_defaults() -> None:
    settings = load()
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8080)
    assert settings.database.path == Path("aibridge.db")
    assert settings.limits.max_body_bytes == 32 * 1024 * 1024
    assert {provider.name: provider.base_url for provider in settings.enabled_providers()} == {
        "anthropic": "https://api.anthropic.com",
        "openai": "https://api.openai.com/v1",
    }
    assert all(provider.api_key is None for provider in settings.enabled_providers()), "bring your own key"


def test_the_tree_is_frozen() -> None:
    settings = load()
    for target, name in ((settings, "server"), (settings.server, "port"), (settings.providers["openai"], "base_url")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(target, name, None)


@pytest.mark.parametrize(("url", "path"), [("sqlite:///a/b.db", "a/b.db"), ("sqlite:////a/b.db", "/a/b.db")])
def test_database_paths(url: str, path: str) -> None:
    assert configured(f'[database]\nurl = "{url}"').database.path == Path(path)


# ---- precedence ----


def test_the_stronger_source_wins_key_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    toml = '[server]\nhost = "::1"\nport = 1000\nshutdown_grace = 1\n[providers.openai]\ndrain_seconds = 1\n'
    assert configured(toml).server.port == 1000
    monkeypatch.setenv("AIBRIDGE_SERVER__PORT", "2000")
    monkeypatch.setenv("AIBRIDGE_PROVIDERS__OPENAI__ON_DISCONNECT", "drain")
    settings = load()
    assert (settings.server.host, settings.server.port, settings.server.shutdown_grace) == ("::1", 2000, 1.0)
    assert settings.providers["openai"].drain_seconds == 1 and settings.providers["openai"].on_disconnect == "drain"
    settings = load(server={"port": 3000})
    assert (settings.server.host, settings.server.port, settings.server.shutdown_grace) == ("::1", 3000, 1.0)


@pytest.mark.parametrize("name", ["anthropic", "openai"])
def test_our_settings_are_stronger_than_the_vendors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> tuple[str, str | None]:
        provider = next(provider for provider in load().enabled_providers() if provider.name == name)
        return provider.base_url, provider.api_key

    vendor, ours = name.upper(), f"AIBRIDGE_PROVIDERS__{name.upper()}"
    default = found()[0]
    monkeypatch.setenv(f"{vendor}_API_KEY", "vendor-key")
    assert found() == (default, "vendor-key")
    monkeypatch.setenv(f"{vendor}_BASE_URL", "http://vendor.example")
    assert found() == ("http://vendor.example", "vendor-key")
    Path("aibridge.toml").write_text(f'[providers.{name}]\napi_key = "file-key"')
    assert found() == ("http://vendor.example", "file-key")
    monkeypatch.setenv(f"{ours}__API_KEY", "our-key")
    assert found() == ("http://vendor.example", "our-key")
    monkeypatch.setenv(f"{ours}__BASE_URL", "http://ours.example")
    assert found() == ("http://ours.example", "our-key")


@pytest.mark.parametrize("name", ["anthropic", "openai"])
def test_a_vendors_key_does_not_go_to_a_configured_server(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{name.upper()}_API_KEY", "vendor-key")
    settings = configured(f'[providers.{name}]\nbase_url = "http://elsewhere.example"')
    assert next(one for one in settings.enabled_providers() if one.name == name).api_key is None


def test_empty_variables_of_the_vendors_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"):
        monkeypatch.setenv(name, "")
    provider = load().enabled_providers()[0]
    assert (provider.base_url, provider.api_key) == ("https://api.anthropic.com", None)


def test_a_file_by_name(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text("[server]\nport = 1234")
    Path("aibridge.toml").write_text("[server]\nport = 1")
    assert load(tmp_path / "other.toml").server.port == 1234
    assert load().server.port == 1


# ---- providers ----


def test_any_number_of_instances() -> None:
    settings = configured("""
        [providers.vllm]
        kind = "openai"
        base_url = "http://gpu-1.internal:8000/v1"
        [providers.open_router-2]
        kind = "openai"
        base_url = "https://openrouter.ai/api/v1"
        api_key = "or"
        [providers.proxy]
        kind = "anthropic"
        base_url = "https://claude.example/prefix/"
        [providers.openai]
        enabled = false
        """)
    providers = {provider.name: provider for provider in settings.enabled_providers()}
    assert set(providers) == {"vllm", "open_router-2", "proxy", "anthropic"}
    assert providers["vllm"].url("/v1/chat/completions", "") == "http://gpu-1.internal:8000/v1/chat/completions"
    assert providers["open_router-2"].url("/v1/responses", "a=b") == "https://openrouter.ai/api/v1/responses?a=b"
    assert providers["proxy"].url("/v1/messages", "") == "https://claude.example/prefix/v1/messages"
    assert providers["vllm"].api_key is None and providers["open_router-2"].api_key == "or"


def test_a_partial_section_of_a_known_provider() -> None:
    settings = configured('[providers.anthropic]\non_disconnect = "drain"')
    assert settings.providers["anthropic"].kind == "anthropic"
    assert settings.providers["anthropic"].base_url == "https://api.anthropic.com"


def test_a_provider_that_is_off_is_checked_all_the_same() -> None:
    message = refusal(f'[providers.x]\nenabled = false\nkind = "openai"\nbase_url = "http://u:{SECRET}@h"')
    assert "providers.x.base_url" in message and "api_key" in message


def test_breakers_and_retries_of_a_provider() -> None:
    settings = configured("""
        [providers.openai.breaker]
        enabled = true
        [providers.openai.retries]
        attempts = 1
        [providers.anthropic.breaker]
        enabled = true
        threshold = 2
        [providers.vllm]
        kind = "openai"
        base_url = "http://gpu:8000/v1"
        [providers.vllm.breaker]
        enabled = true
        statuses = [500]
        open_seconds = 1
        probes = 3
        """)
    providers = {provider.name: provider for provider in settings.enabled_providers()}
    assert providers["openai"].breaker == BreakerRules(frozenset({503, 504}), threshold=5, open_seconds=30, probes=1)
    assert providers["anthropic"].breaker == BreakerRules(frozenset({503, 504, 529}), threshold=2, open_seconds=30, probes=1)
    assert providers["vllm"].breaker == BreakerRules(frozenset({500}), threshold=5, open_seconds=1, probes=3)
    assert providers["openai"].retries == RetryRules(1, frozenset(), 10.0)
    untouched = configured("").enabled_providers()[0]
    assert untouched.breaker is None and untouched.retries == RetryRules()


# ---- secrets ----


def test_secrets_by_value_variable_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text(f"{SECRET}\n")
    monkeypatch.setenv("MY_KEY", f" {SECRET}\n")
    for given in (f'"{SECRET}"', '{ env = "MY_KEY" }', f'{{ file = "{tmp_path}/key" }}'):
        settings = configured(f"[providers.openai]\napi_key = {given}")
        assert _plain(settings.providers["openai"].api_key) == SECRET
    for name, value in (("ENV", "MY_KEY"), ("FILE", f"{tmp_path}/key")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(f"AIBRIDGE_PROVIDERS__ANTHROPIC__API_KEY__{name}", value)
            assert _plain(load().providers["anthropic"].api_key) == SECRET


def test_secrets_are_not_shown() -> None:
    settings = configured(f'[providers.openai]\napi_key = "{SECRET}"')
    provider = next(provider for provider in settings.enabled_providers() if provider.name == "openai")
    assert provider.api_key == SECRET
    shown = [repr(settings), str(settings), repr(provider), describe(settings), settings.model_dump_json()]
    assert not any(SECRET in text for text in shown)


def test_secrets_of_mcp_servers_are_not_shown() -> None:
    settings = configured(
        f"""
        [mcp.servers.web]
        url = "https://user:{SECRET}@h/mcp?key={SECRET}"
        headers = {{ X-Key = "{SECRET}" }}
        [mcp.servers.local]
        command = ["serve it", "--token", "{SECRET}", "x y"]
        env = {{ TOKEN = "{SECRET}" }}
        """
    )
    servers = settings.mcp_servers()
    assert servers["web"].headers == {"X-Key": SECRET} and SECRET in str(servers["web"].url)
    assert servers["local"].command == ("serve it", "--token", SECRET, "x y")
    shown = [repr(settings), str(settings), repr(servers), describe(settings), settings.model_dump_json()]
    assert not any(SECRET in text for text in shown)
    assert 'url = "https://h/mcp"' in describe(settings)
    assert 'command = ["serve it", "--token", "***", "x y"]' in describe(settings)


def test_the_description_is_the_configuration(tmp_path: Path) -> None:
    """What ``aibridge check`` prints is TOML that says the same."""
    settings = configured(
        '[server]\nallowed_hosts = ["a"]\n[providers.vllm]\nkind = "openai"\nbase_url = "http://x/é\\"/v1"'
    )
    (tmp_path / "printed.toml").write_text(describe(settings))
    assert load(tmp_path / "printed.toml").model_dump() == settings.model_dump()


# ---- what is wrong is said ----

# TOML, what the message must hold: the key, and what is wrong or valid.
MISTAKES: list[tuple[str, list[str]]] = [
    (
        "[servr]\nport = 1",
        ["servr:", "no such setting", "database, dumps, identity, limits, log, mcp, providers, server, tracing, upstream"],
    ),
    ("port = 1", ["port:", "no such setting", "server"]),
    ("[server]\nprot = 1", ["server.prot:", "no such setting", "valid here: allowed_hosts, ", " port, "]),
    ("[providers.openai]\nkey = 1", ["providers.openai.key:", "no such setting", "api_key, ask_for_usage, base_url"]),
    ("server = 1", ["server:", "section"]),
    ("providers = 1", ["providers:", "section"]),
    ("[providers]\nopenai = 1", ["providers.openai:", "section"]),
    ('[server]\nport = "x"', ["server.port:", "integer"]),
    ("[server]\nport = 65536", ["server.port:", "65535"]),
    ("[server]\nport = -1", ["server.port:", "0"]),
    ("[server]\nhost = 1", ["server.host:", "string"]),
    ("[server]\nworkers = 0", ["server.workers:", "greater than or equal to 1"]),
    ("[server]\nshutdown_grace = inf", ["server.shutdown_grace:", "finite"]),
    ("[server]\nshutdown_grace = -1", ["server.shutdown_grace:", "greater than or equal to 0"]),
    ("[server]\nallowed_hosts = 1", ["server.allowed_hosts:"]),
    ('[server]\nallowed_hosts = ["a:80"]', ["server.allowed_hosts:", "'a:80'", "gateway.internal"]),
    ('[database]\nurl = "postgresql://u:p@h/d"', ["database.url:", "sqlite:///PATH"]),
    ('[database]\nurl = "sqlite:///"', ["database.url:", "sqlite:///PATH"]),
    ('[database]\nwhen_unavailable = "ignore"', ["database.when_unavailable:", "'refuse' or 'continue'"]),
    ('[identity]\nheader = "X User"', ["identity.header:"]),
    ('[identity]\ntrusted_proxies = ["10.0.0.1/8"]', ["identity.trusted_proxies:", "10.0.0.1/8", "10.0.0.0/8"]),
    ("[limits]\nmax_body_bytes = 0", ["limits.max_body_bytes:", "greater than 0"]),
    ("[limits]\nmax_concurrent = 0", ["limits.max_concurrent:", "greater than or equal to 1"]),
    ("[limits]\nrequests_per_minute = 0.5", ["limits.requests_per_minute:", "integer"]),
    ("[server]\nwrite_timeout = 0", ["server.write_timeout:", "greater than 0"]),
    ("[providers.openai.breaker]\nstatuses = [503, 429]", ["providers.openai.breaker.statuses:", "from 500 to 599"]),
    ("[providers.openai.breaker]\nopen = 1", ["providers.openai.breaker.open:", "no such setting", "open_seconds, probes"]),
    ("[providers.openai.breaker]\nprobes = 0", ["providers.openai.breaker.probes:", "greater than or equal to 1"]),
    ("[providers.openai.retries]\nstatuses = [200]", ["providers.openai.retries.statuses:", "from 400 to 599"]),
    ("[providers.openai.retries]\nattempts = 11", ["providers.openai.retries.attempts:", "less than or equal to 10"]),
    ("[providers.openai]\nretries = 1", ["providers.openai.retries:", "section"]),
    ("[upstream]\nidle_timeout = 0", ["upstream.idle_timeout:", "greater than 0"]),
    ("[upstream]\nconnect_timeout = nan", ["upstream.connect_timeout:", "finite"]),
    ("[providers.x]", ["providers.x.kind: is required", "providers.x.base_url: is required"]),
    ('[providers.x]\nkind = "gemini"\nbase_url = "http://x"', ["providers.x.kind:", "'anthropic' or 'openai'"]),
    ('[providers.openai]\non_disconnect = "x"', ["providers.openai.on_disconnect:", "'cancel' or 'drain'"]),
    ('[providers.openai]\nca_file = "/nope"', ["providers.openai.ca_file:", "/nope"]),
    ("[providers.openai]\nask_for_usage = 3", ["providers.openai.ask_for_usage:", "boolean"]),
    ('[identity]\ntrusted_proxies = ["10.0.0.0/8"]', ["identity:", "trusted_proxies", "header"]),
    (f'[providers.openai]\nbase_url = "http://u:{SECRET}@h/?x={SECRET}"', ["without a query", "credentials; use api_key"]),
    ("[mcp]\nservers = 1", ["mcp.servers:", "section"]),
    ('[mcp]\nskip_models = ["("]', ["mcp.skip_models:", "'('", "regular expression"]),
    ('[mcp.servers.X_y]\nurl = "http://h/mcp"', ["mcp.servers.X_y:", "'X_y'", "lower-case letters"]),
    ("[mcp.servers.x]", ["mcp.servers.x:", "a url or a command"]),
    ('[mcp.servers.x]\nurl = "http://h/mcp"\ncommand = ["a"]', ["mcp.servers.x:", "a url or a command"]),
    ('[mcp.servers.x]\nurl = "ftp://h"', ["mcp.servers.x:", "http:// or https://"]),
    ('[mcp.servers.x]\ncommand = "python -m x"', ["mcp.servers.x.command:", "must be a list"]),
    ('[mcp.servers.x]\nurl = "http://h/mcp"\nallow = ["("]', ["mcp.servers.x:", "'('", "regular expression"]),
    ('[mcp.servers.x]\nurl = "http://h/mcp"\ntransport = "ws"', ["mcp.servers.x.transport:", "'http' or 'sse'"]),
    (f'[mcp.servers.x]\nurl = "http://h/mcp"\nenv = {{ A = "{SECRET}" }}', ["mcp.servers.x:", "command"]),
    (f'[mcp.servers.x]\nurl = "http://h/mcp"\nheaders = {{ "a b" = "{SECRET}" }}', ["mcp.servers.x:", "'a b'"]),
    (
        '[mcp.servers.x]\nurl = "http://h/mcp"\nheaders = { A = { env = "NO" } }',
        ["mcp.servers.x.headers.A:", "NO is not set"],
    ),
    ('[mcp.servers.x]\nheders = { A = "b" }', ["mcp.servers.x.heders:", "no such setting", "headers"]),
    ("[providers.openai]\ndrain_seconds = 0", ["providers.openai.drain_seconds:", "greater than 0"]),
    *[
        (f'[providers."{name}"]\nkind = "openai"\nbase_url = "http://x"', ["providers", name, "lower-case letters"])
        for name in ("Upper", "a b", "a/b", "", "-a", "metrics", "ui", "x" * 65)
    ],
    *[
        (f'[providers.x]\nkind = "openai"\nbase_url = "{url}"', ["providers.x.base_url:", "http:// or https://"])
        for url in (
            "x",
            "ftp://h",
            "http://",
            "http://h:99999",
            "http://h:x",
            "http://[::1",
            "http://h?a",
            "http://h/ a",
            "",
        )
    ],
    (f'[providers.x]\nkind = "openai"\nbase_url = "http://u:{SECRET}@h"', ["providers.x.base_url:", "api_key"]),
    ('[providers.openai]\napi_key = { env = "NOT_SET" }', ["providers.openai.api_key:", "NOT_SET is not set"]),
    (f'[providers.openai]\napi_key = {{ env = "{SECRET}" }}', ["providers.openai.api_key:", "environment variable"]),
    ('[providers.openai]\napi_key = { file = "/nope" }', ["providers.openai.api_key:", "/nope cannot be read"]),
    ('[providers.openai]\napi_key = { file = "." }', ["providers.openai.api_key:", "cannot be read"]),
    (f'[providers.openai]\napi_key = {{ envv = "{SECRET}" }}', ["providers.openai.api_key:", '{ env = "VARIABLE" }']),
    ('[providers.openai]\napi_key = { env = "A", file = "B" }', ["providers.openai.api_key:", '{ file = "PATH" }']),
    (f'[providers.openai]\napi_key = ["{SECRET}"]', ["providers.openai.api_key:", "a secret is a string"]),
    ("[providers.openai]\napi_key = 123", ["providers.openai.api_key:", "a secret is a string"]),
    ('[providers.openai]\napi_key = ""', ["providers.openai.api_key:", "empty"]),
    (f'[providers.openai]\napi_key = "{SECRET}\\nx"', ["providers.openai.api_key:", "line breaks"]),
    ("[server\nport = 1", ["aibridge.toml is not TOML", "line 1"]),
    ("[server]\nport = 1\nport = 2", ["aibridge.toml is not TOML", "overwrite"]),
    (f'[providers.openai]\napi_key = "{SECRET}', ["aibridge.toml is not TOML"]),
]


@pytest.mark.parametrize(("toml", "said"), MISTAKES, ids=[re.sub(r"\s+", " ", toml)[:60] for toml, _ in MISTAKES])
def test_a_mistake_in_the_file(toml: str, said: list[str]) -> None:
    message = refusal(toml)
    assert [part for part in said if part not in message] == [], message


def test_all_mistakes_are_reported_at_once() -> None:
    lines = refusal('[server]\nport = "x"\nprot = 1\n[database]\nurl = "x"').splitlines()
    assert [line.partition(":")[0] for line in lines] == ["server.port", "server.prot", "database.url"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AIBRIDGE_SERVR__PORT", "1", ["servr:", "no such setting", "server"]),
        ("AIBRIDGE_SERVER__PROT", "1", ["server.prot:", "no such setting", "port"]),
        ("AIBRIDGE_SERVER__PORT", "", ["server.port:", "integer"]),
        ("AIBRIDGE_SERVER__PORT", "http", ["server.port:", "integer"]),
        ("AIBRIDGE_SERVER", "x", ["server:", "section"]),
        ("AIBRIDGE_SERVER", '{"port"', ["server:", "section"]),
        ("AIBRIDGE_PROVIDERS__OPENAI", SECRET, ["providers.openai:", "section"]),
        ("AIBRIDGE_PROVIDERS__OPENAI__KEY", SECRET, ["providers.openai.key:", "no such setting", "api_key"]),
        ("AIBRIDGE_PROVIDERS__X__KIND", "openai", ["providers.x.base_url: is required"]),
        ("AIBRIDGE_IDENTITY__TRUSTED_PROXIES", '["10.0.0.0/8"', ["identity.trusted_proxies:", "10.0.0.0/8"]),
        ("AIBRIDGE_PROVIDERS__OPENAI__API_KEY", "", ["providers.openai.api_key:", "empty"]),
        ("AIBRIDGE_PROVIDERS__OPENAI__API_KEY__ENV", "NOT_SET", ["providers.openai.api_key:", "NOT_SET is not set"]),
        ("AIBRIDGE_MCP__SERVERS__X__URL", "h/mcp", ["mcp.servers.x:", "http:// or https://"]),
        ("AIBRIDGE_MCP__SERVERS__X__HEADERS", SECRET, ["mcp.servers.x.headers:", "section"]),
        ("OPENAI_BASE_URL", "api.openai.com", ["providers.openai.base_url:", "http:// or https://"]),
    ],
)
def test_a_mistake_in_a_variable(name: str, value: str, said: list[str]) -> None:
    message = refusal(env={name: value})
    assert [part for part in said if part not in message] == [], message


def test_variables_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Kubernetes sets these for a service called "aibridge"; the last is one of this project's tests.
    for name in ("AIBRIDGE_PORT", "AIBRIDGE_SERVICE_HOST", "AIBRIDGE_PORT_8080_TCP", "AIBRIDGE_FUZZ_EXAMPLES"):
        monkeypatch.setenv(name, "tcp://10.0.0.1:8080")
    assert load().server.port == 8080


def test_a_mistake_on_the_command_line() -> None:
    assert "server.port:" in refusal(server={"port": 70000})


def test_a_file_of_certificates_that_has_none(authority: Authority) -> None:
    """It is found before the gateway serves, and not by each request."""
    Path("empty.pem").touch()
    Path("folder.pem").mkdir()
    for name, said in (
        ("empty.pem", "holds no certificates"),
        (str(authority.folder / "ca.key"), "holds no certificates"),
        ("folder.pem", "folder.pem"),
    ):
        message = refusal(f'[providers.openai]\nca_file = "{name}"')
        assert message.startswith("providers.openai.ca_file: ") and said in message


def test_all_names_that_cannot_be_are_reported_beside_all_else() -> None:
    provider = 'kind = "openai"\nbase_url = "http://x"\n'
    names = "".join(f'[providers."{name}"]\n{provider}' for name in ("API", "metrics", "a b"))
    lines = refusal(
        f'{names}[server]\nport = "x"\n[mcp.servers.X_y]\nurl = "http://h/mcp"\n[mcp.servers.Z]\nurl = "h"'
    ).splitlines()
    keys = [line.partition(": ")[0] for line in lines]
    assert keys == [
        "server.port",
        "providers.API",
        "providers.metrics",
        "providers.a b",
        "mcp.servers.X_y",
        "mcp.servers.Z",
        "mcp.servers.Z",
    ]


def test_a_file_that_is_not_there_or_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no configuration file .*nope\.toml"):
        load(tmp_path / "nope.toml")
    (tmp_path / "latin.toml").write_bytes(b'[server]\nhost = "\xe9"')
    with pytest.raises(ConfigurationError, match=r"latin\.toml cannot be read"):
        load(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ("", "http://127.0.0.1:8080/openai/v1"),
        ("", "http://localhost:8080/v1"),
        ("", "http://[::1]:8080/v1"),
        ("port = 80", "http://localhost/v1"),
        ('host = "0.0.0.0"', "http://127.0.0.1:8080/v1"),
        ('host = "10.1.2.3"', "http://10.1.2.3:8080/v1"),
    ],
)
def test_a_provider_that_is_this_gateway(server: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = '[identity]\nheader = "X-User"\ntrusted_proxies = ["10.0.0.0/8"]\n'
    message = refusal(f'[server]\n{server}\n{identity}[providers.openai]\nbase_url = "{url}"')
    assert "providers.openai.base_url points at this gateway itself" in message and "OPENAI_BASE_URL" not in message
    message = refusal(f"[server]\n{server}\n{identity}", {"OPENAI_BASE_URL": url})
    assert "providers.openai.base_url points at this gateway itself" in message and "OPENAI_BASE_URL" in message


@pytest.mark.parametrize(
    ("server", "url"), [("", "http://127.0.0.1:11434/v1"), ('host = "10.1.2.3"', "http://127.0.0.1:8080/v1")]
)
def test_a_provider_beside_this_gateway(server: str, url: str) -> None:
    identity = '[identity]\nheader = "X-User"\ntrusted_proxies = ["10.0.0.0/8"]\n'
    assert configured(f'[server]\n{server}\n{identity}[providers.openai]\nbase_url = "{url}"').enabled_providers()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.1.2.3", "gateway.internal"])
def test_other_binds_need_an_authenticator(host: str) -> None:
    message = refusal(f'[server]\nhost = "{host}"')
    assert "server.host" in message and "identity.header" in message and "127.0.0.1" in message
    message = refusal(f'[server]\nhost = "{host}"\n[identity]\nheader = "X-User"')
    assert "identity.trusted_proxies" in message and "10.0.0.0/8" in message
    settings = configured(f'[server]\nhost = "{host}"\n[identity]\nheader = "X-User"\ntrusted_proxies = ["10.0.0.0/8"]')
    assert not settings.server.on_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert configured(f'[server]\nhost = "{host}"').server.on_loopback


# ---- the documentation ----


@pytest.mark.parametrize(("key", "field"), list(all_keys()), ids=[key for key, _ in all_keys()])
def test_every_setting_is_documented(key: str, field: Any) -> None:
    rows = [line for line in DOCUMENTATION.read_text().splitlines() if line.startswith(f"| `{key}` |")]
    assert len(rows) == 1, "one row"
    default, meaning = [cell.strip(" |") for cell in rows[0].split(" | ")][2:4]
    assert f"`AIBRIDGE_{key.upper().replace('.', '__')}`" in meaning
    if field.is_required():
        assert default.startswith("required")
    elif field.default is None:
        assert default == "none"
    else:
        shown = [] if field.default == () else field.get_default(call_default_factory=True)
        documented = tomllib.loads(f"x = {default.strip('`')}")["x"]
        assert documented == (str(shown) if isinstance(shown, Path) else shown)
    for option in get_args(field.annotation):
        assert not isinstance(option, str) or f'`"{option}"`' in rows[0], "each choice is named"


def test_no_other_setting_is_documented() -> None:
    documented = set(re.findall(r"^\| `([a-z_]+\.[A-Za-z_.]+)` \|", DOCUMENTATION.read_text(), re.MULTILINE))
    assert documented == {key for key, _ in all_keys()}


def test_every_row_of_the_documentation_is_in_a_table() -> None:
    """One table for each section. Rows behind an empty line are no table (GitHub Flavored Markdown, section 4.10)."""
    sections = re.split(r"^## ", DOCUMENTATION.read_text(), flags=re.MULTILINE)[1:]
    for blocks in (re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE) for section in sections):
        assert len(blocks) <= 1 and all(block.startswith("| key | type | default | meaning |\n| --- |") for block in blocks)


def test_the_examples_in_the_documentation_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openai").write_text("key")
    for name in ("COMPANY_ANTHROPIC_KEY", "OPENROUTER_API_KEY"):
        monkeypatch.setenv(name, "key")
    examples = re.findall(r"```toml\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
    assert len(examples) == 4
    for example in examples:
        assert configured(example.replace("/run/secrets", str(tmp_path))).enabled_providers()
