"""What ships in deploy to run the gateway: units of systemd, the image, the composition.

Truth: systemd-analyze(1), which reads units as systemd does; the Dockerfile reference for what an instruction means; our own
command line and configuration for whatever they name. No container engine runs here: what an image would do is done outside.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from click.testing import CliRunner

from aibridge.cli import main
from aibridge.config import ConfigurationError, Settings, load
from aibridge.process import _OPEN_FILES
from aibridge.settings import DatabaseSettings
from tests.support.gateway import Gateway

ROOT: Final = Path(__file__).parent.parent
SYSTEMD: Final = ROOT / "deploy" / "systemd"
CONTAINERFILE: Final = ROOT / "deploy" / "Containerfile"
GUIDE: Final = ROOT / "docs" / "deploy.md"

LAST_RECORDS_SECONDS: Final = 15  # what httpserver and bridge wait for after the grace
MAX_EXPOSURE: Final = 1.5  # of 10; systemd-analyze calls what is below 2 OK


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and an environment without settings."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.upper().startswith(("AIBRIDGE_", "ANTHROPIC_", "OPENAI_")):
            monkeypatch.delenv(name)
    return tmp_path


def loaded(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The configuration in an environment. Raises `ConfigurationError`, also for a variable that is no setting."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return load()


def assert_is_a_command(arguments: list[str]) -> None:
    """Its words are commands of ours, and its options are theirs."""
    commands = [word for word in arguments if re.fullmatch(r"[a-z]+", word)]
    described = CliRunner().invoke(main, [*commands, "--help"])
    assert described.exit_code == 0 and f"Usage: main {' '.join(commands)}" in described.output
    for option in (word for word in arguments if word.startswith("-")):
        assert re.search(rf"^\s+{option}\b", described.output, re.MULTILINE), option


# ---- systemd ----


def assignments(unit: str) -> list[tuple[str, str]]:
    """What a unit file says, in order, without its comments (systemd.syntax(7))."""
    lines = (SYSTEMD / unit).read_text().splitlines()
    return [(name, value) for name, found, value in (line.partition("=") for line in lines if line[:1].isalpha()) if found]


def setting(unit: str, name: str) -> str:
    """The value of a name that is there once."""
    (value,) = (value for found, value in assignments(unit) if found == name)
    return value


def environment_of(unit: str, credentials: Path) -> dict[str, str]:
    """The variables that a unit sets, with the specifiers of systemd.unit(5)."""
    given = [value for name, value in assignments(unit) if name == "Environment"]
    return dict(value.replace("%S", "/var/lib").replace("%d", str(credentials)).split("=", 1) for value in given)


def version_of_systemd() -> int:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian has it in the package systemd)")
    said = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout
    return int(said.split()[1])


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """A copy of the units, in which the program is the one that is installed here."""
    version = version_of_systemd()
    copy = tmp_path / "units"
    shutil.copytree(SYSTEMD, copy)
    drop_ins = copy / "aibridge.service.d"
    drop_ins.mkdir()
    (copy / "keys.conf").rename(drop_ins / "keys.conf")
    service = copy / "aibridge.service"
    text = service.read_text().replace("/opt/aibridge/bin/aibridge", str(Path(sys.executable).with_name("aibridge")))
    if version < 253:  # notify-reload is younger; docs/deploy.md says what to do
        text = text.replace("Type=notify-reload", "Type=notify\nExecReload=kill -HUP $MAINPID")
    service.write_text(text)
    return copy


def verified(units: Path) -> str:
    """What systemd-analyze has to say against the units, beyond what other units of this machine are guilty of."""
    files = [str(units / "aibridge.service"), str(units / "aibridge.socket")]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", *files],
        env={"PATH": os.environ["PATH"], "SYSTEMD_UNIT_PATH": f"{units}:"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout + done.stderr


def test_systemd_takes_the_units(units: Path) -> None:
    assert verified(units) == ""


@pytest.mark.parametrize("file", ["aibridge.service", "aibridge.socket", "aibridge.service.d/keys.conf"])
def test_systemd_would_complain(file: str, units: Path) -> None:
    """The check can fail, whichever file is wrong."""
    (units / file).write_text(
        (units / file)
        .read_text()
        .replace("Socket]\n", "Socket]\nMisspelt=1\n")
        .replace("Service]\n", "Service]\nMisspelt=1\n")
    )
    assert "Misspelt" in verified(units)


def test_the_service_is_confined(units: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(units / "aibridge.service")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r"Overall exposure level for aibridge.service: ([\d.]+)", said)
    assert found is not None and float(found[1]) <= MAX_EXPOSURE, said


def test_the_command_of_the_service() -> None:
    program, *arguments = setting("aibridge.service", "ExecStart").split()
    assert Path(program).name == "aibridge"
    assert_is_a_command(arguments)


def test_the_settings_of_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"anthropic": "key-a", "openai": "key-o"}
    named = [value for name, value in assignments("keys.conf") if name == "LoadCredential"]
    for name, path in (value.split(":") for value in named):
        assert path == f"/etc/aibridge/{name}.key" and path in GUIDE.read_text()
        (tmp_path / name).write_text(keys.pop(name))
    environment = environment_of("aibridge.service", tmp_path) | environment_of("keys.conf", tmp_path)
    settings = loaded(environment, monkeypatch)
    assert setting("aibridge.service", "WorkingDirectory") == f"%S/{setting('aibridge.service', 'StateDirectory')}"
    assert settings.database == DatabaseSettings(), "in that directory, unless the file says otherwise"
    assert {provider.name: provider.api_key for provider in settings.enabled_providers()} == {
        "anthropic": "key-a",
        "openai": "key-o",
    }
    assert not keys


def test_the_service_has_the_time_and_the_files_that_it_needs() -> None:
    server = Settings().server
    needed = server.drain_delay + server.shutdown_grace + LAST_RECORDS_SECONDS
    assert int(setting("aibridge.service", "TimeoutStopSec")) > needed
    assert int(setting("aibridge.service", "LimitNOFILE")) == _OPEN_FILES
    assert setting("aibridge.service", "Type") == "notify-reload" and int(setting("aibridge.service", "WatchdogSec")) > 5


def test_the_socket_is_where_clients_expect_the_gateway() -> None:
    server = Settings().server
    assert setting("aibridge.socket", "ListenStream") == f"{server.host}:{server.port}"


# ---- the image ----


def instructions() -> Iterator[tuple[str, str]]:
    """The instructions of the Containerfile, each in one line, without comments (Dockerfile reference, "Format")."""
    text = "\n".join(line for line in CONTAINERFILE.read_text().splitlines() if not line.startswith("#"))
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            yield name, " ".join(rest.split()) if name != "HEALTHCHECK" else rest


def of(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def variables() -> dict[str, str]:
    """What the image sets."""
    (line,) = of("ENV")
    return dict(part.split("=", 1) for part in line.split())


def settings_of_the_image() -> dict[str, str]:
    return {name: value for name, value in variables().items() if name.startswith("AIBRIDGE_")}


def test_both_stages_are_of_one_python_that_we_support() -> None:
    """An environment is copied from one to the other, and its programs name their interpreter. No registry is named."""
    first, second = (line.split()[0] for line in of("FROM"))
    assert first == second and re.fullmatch(r"python:3\.(\d+)-slim", first)


def test_what_is_copied_is_enough_to_build_from(tmp_path: Path) -> None:
    """The build's own steps need a registry. The wheel is built from the same files, with what is installed here."""
    for line in of("COPY"):
        if not line.startswith("--from"):
            *sources, target = line.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, tmp_path / target)
    (build,) = (line for line in of("RUN") if "pip wheel" in line)
    assert "--no-build-isolation" in build and "--constraint constraints.txt" in build
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        "made",
        ".",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.suffix for path in (tmp_path / "made").iterdir()] == [".whl"]


def test_the_shell_takes_its_steps() -> None:
    for step in of("RUN"):
        subprocess.run(["sh", "-n", "-c", step], check=True, timeout=10)


def test_the_first_process_is_the_gateway() -> None:
    """In the form without a shell, which would keep SIGTERM to itself (Dockerfile reference, "ENTRYPOINT")."""
    (entry,), (command,) = of("ENTRYPOINT"), of("CMD")
    program, *arguments = json.loads(entry) + json.loads(command)
    assert program == "aibridge" and of("STOPSIGNAL") == ["SIGTERM"]
    assert_is_a_command(arguments)


def test_it_runs_as_somebody_who_owns_the_ledger_and_nothing_else() -> None:
    user, group = of("USER")[0].split(":")
    (setup,) = (line for line in of("RUN") if "useradd" in line)
    assert int(user) > 0 and f"--uid {user} --gid {group}" in setup and f"groupadd --system --gid {group}" in setup
    assert f"runAsUser: {user}" in GUIDE.read_text() and f"fsGroup: {group}" in GUIDE.read_text()
    (volume,) = of("VOLUME")
    assert setup.endswith(f"--mode 0700 {volume}") and of("WORKDIR")[-1] == volume


def test_the_settings_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not let strangers in: it says what is missing, and starts with that."""
    with pytest.raises(ConfigurationError, match=r"identity\.header and identity\.trusted_proxies"):
        loaded(settings_of_the_image(), monkeypatch)
    settings = loaded(
        {"AIBRIDGE_IDENTITY__HEADER": "X-User", "AIBRIDGE_IDENTITY__TRUSTED_PROXIES": "10.0.0.0/8"}, monkeypatch
    )
    assert str(settings.server.port) == of("EXPOSE")[0]
    assert settings.database == DatabaseSettings() and of("WORKDIR")[-1] == of("VOLUME")[0], "the ledger is in the volume"


def test_the_image_fixes_what_the_guide_says() -> None:
    """All else is for the configuration file to say, as docs/configuration.md shows it."""
    (sentence,) = re.findall(r"\*\*What the image fixes\*\*(.*?)Nothing else", GUIDE.read_text(), re.DOTALL)
    fixed = {name.removeprefix("AIBRIDGE_").replace("__", ".").lower() for name in settings_of_the_image()}
    assert fixed == set(re.findall(r"`(\w+\.\w+)`", sentence))


def test_the_units_fix_what_the_guide_says() -> None:
    """`test_systemd` has the socket."""
    assert "Environment" not in [name for name, _ in assignments("aibridge.service")]
    names = [value.partition("=")[0] for name, value in assignments("keys.conf") if name == "Environment"]
    assert len(names) == 2 and all(name.endswith("__API_KEY__FILE") for name in names)


def health_check(port: int) -> int:
    (line,) = of("HEALTHCHECK")
    program, *arguments = json.loads(line[line.index("[") :])
    assert program == "python" and settings_of_the_image()["AIBRIDGE_SERVER__PORT"]
    proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={"AIBRIDGE_SERVER__PORT": str(port), **proxy},
        capture_output=True,
        timeout=30,
        check=False,
    )
    return done.returncode


def test_the_health_check() -> None:
    with Gateway() as gateway:
        assert health_check(gateway.port) == 0
        gateway.stop()
        assert health_check(gateway.port) == 1
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert health_check(silent.getsockname()[1]) == 1


# ---- the composition, and the guide ----


def test_the_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    composed = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    gateway = composed["services"]["aibridge"]
    build = ROOT / "deploy" / gateway["build"]["context"]
    assert build.resolve() == ROOT and (build / gateway["build"]["dockerfile"]) == build / "deploy/Containerfile"
    environment = {name: value for name, value in gateway["environment"].items() if value is not None}
    settings = loaded(settings_of_the_image() | environment, monkeypatch)
    assert settings.server.on_loopback and gateway["network_mode"] == "host"
    assert f"{of('VOLUME')[0]}" in [volume.split(":")[1] for volume in gateway["volumes"]]
    for service in composed["services"].values():
        for source in (volume.split(":")[0] for volume in service["volumes"]):
            assert source in composed["volumes"] or (ROOT / "deploy" / source).is_dir(), source
        assert {config["source"] for config in service.get("configs", ())} <= set(composed["configs"])
    options = dict(option.split("=", 1) for option in composed["services"]["prometheus"]["command"])
    assert (ROOT / "deploy" / "prometheus" / Path(options["--config.file"]).name).is_file()
    assert all(yaml.safe_load(config["content"])["apiVersion"] == 1 for config in composed["configs"].values())


def test_the_guide_names_settings_and_files_that_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = GUIDE.read_text()
    for path in re.findall(r"deploy/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for section, key in re.findall(r"`(\w+)\.(\w+)`", text):
        assert key in Settings.model_fields[section].annotation.model_fields, f"{section}.{key}"  # type: ignore[union-attr]
    (manifest,) = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    pod: dict[str, Any] = manifest["spec"]
    (container,) = pod["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    (tmp_path / "anthropic").write_text("key")
    environment["AIBRIDGE_PROVIDERS__ANTHROPIC__API_KEY__FILE"] = str(tmp_path / "anthropic")
    server = loaded(settings_of_the_image() | environment, monkeypatch).server
    assert pod["terminationGracePeriodSeconds"] >= server.drain_delay + server.shutdown_grace + LAST_RECORDS_SECONDS
    assert {probe: container[probe]["httpGet"]["path"] for probe in ("livenessProbe", "readinessProbe")} == {
        "livenessProbe": "/healthz",
        "readinessProbe": "/readyz",
    }
    assert of("VOLUME")[0] in [mount["mountPath"] for mount in container["volumeMounts"]]
    for name in re.findall(r"AIBRIDGE_[A-Z_]+__[A-Z_]+", text):
        monkeypatch.setenv(name, environment.get(name, settings_of_the_image().get(name, "")))
    assert load().identity.header == environment["AIBRIDGE_IDENTITY__HEADER"]
