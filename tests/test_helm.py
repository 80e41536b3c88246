"""The Helm chart, rendered by Helm's own library and held against Kubernetes' own schemas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from fleet import ENVOY_CONFIG
from helm import CHART, Helm
from shipped_metrics import metrics_of, published

from specserve.config import load_config

VERSIONS = ("1.30", "1.37")
CUSTOM = {"ScaledObject", "PodMonitor", "PrometheusRule"}  # not Kubernetes' own: no schema here

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "hpa": {"autoscaling": {"kind": "hpa"}},
    "keda": {"autoscaling": {"kind": "keda"}},
    "cpu": {"gpus": {"count": 0}, "engines": {"claim": ""}, "config": {"engine": None}},
    "everything": {
        "image": {"tag": "1", "pullSecrets": [{"name": "registry"}]},
        "gpus": {"count": 4, "resource": "nvidia.com/mig-3g.40gb", "runtimeClassName": "nvidia"},
        "engines": {"subPath": "llama"},
        "config": {
            "scheduler": {"max_num_seqs": 128, "kv_cache_tokens": 1048576},
            "slo": {"reject_late_classes": ["interactive"], "best_effort_ttft_s": 20.5},
            "telemetry": {"devices": ["0", "1", "2", "3"], "min_free_bytes": 536870912},
        },
        "extraArgs": ["--show-log"],
        "extraEnv": [{"name": "NCCL_DEBUG", "value": "WARN"}],
        "profiles": {"claim": "profiles"},
        "nodeSelector": {"gpu": "h200"},
        "priorityClassName": "serving",
        "podAnnotations": {"a": "b"},
        "balancer": {"service": {"type": "LoadBalancer", "annotations": {"c": "d"}}},
        "networkPolicy": {"clients": [{"podSelector": {"matchLabels": {"app": "web"}}}]},
        "monitoring": {
            "podMonitor": True,
            "rules": True,
            "dashboard": True,
            "labels": {"release": "kube-prometheus"},
        },
    },
}
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def helm() -> Iterator[Helm]:
    helm = Helm()
    yield helm
    helm.close()


def render(helm: Helm, variant: str) -> list[dict[str, Any]]:
    """Return every object of a release called `demo`."""
    files = helm.render(VARIANTS[variant])
    texts = [text for path, text in files.items() if path.endswith(".yaml")]
    return [each for text in texts for each in yaml.safe_load_all(text) if each]


def only(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [o for o in objects if (o["kind"], o["metadata"]["name"]) == (kind, name)]
    return found


def container(objects: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = only(objects, "Deployment", name)["spec"]["template"]["spec"]["containers"]
    return found


def test_helm_lint_has_nothing_to_say(helm: Helm) -> None:
    for values in VARIANTS.values():
        report = helm.lint(values)
        assert report["errors"] == []
        assert [m for m in report["messages"] if m["error"] != "icon is recommended"] == []


@EVERY_VARIANT
@pytest.mark.parametrize("version", VERSIONS)
def test_objects_follow_kubernetes_schemas(helm: Helm, variant: str, version: str) -> None:
    objects = render(helm, variant)
    for one in objects:
        if one["kind"] not in CUSTOM:
            kubernetes_validate.validate(one, version, strict=True)
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(set(names)) == len(names)


def test_the_schemas_know_a_misspelt_field(helm: Helm) -> None:
    """Else the test above would show nothing."""
    one = only(render(helm, "default"), "Deployment", "demo-specserve")
    one["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(one, VERSIONS[0], strict=True)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"replica": 2}, "replica"),
        ({"gpus": {"count": "two"}}, "count"),
        ({"autoscaling": {"kind": "vpa"}}, "kind"),
        ({"drainSeconds": 10}, "drainSeconds"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(
    helm: Helm, values: dict[str, Any], words: str
) -> None:
    assert words in (helm.refusal(values) or "")


@EVERY_VARIANT
def test_the_server_reads_the_configuration(helm: Helm, variant: str, tmp_path: Path) -> None:
    """Numbers of a values file must come out whole where the configuration wants them whole."""
    path = tmp_path / "specserve.toml"
    objects = render(helm, variant)
    path.write_text(only(objects, "ConfigMap", "demo-specserve")["data"]["specserve.toml"])
    config = load_config(path)
    if variant == "everything":
        assert config.scheduler.max_num_seqs == 128
        assert config.scheduler.kv_cache_tokens == 1048576
        assert config.slo.best_effort_ttft_s == 20.5
        assert config.telemetry.devices == ("0", "1", "2", "3")
    if variant != "cpu":
        assert (config.engine.name, config.engine.dir) == ("tensorrt_llm", "/engines")
    arguments = container(objects, "demo-specserve")["args"]
    assert arguments[:2] == ["--config", "/etc/specserve/specserve.toml"]


def test_gpus_engines_and_memory_reach_the_container(helm: Helm) -> None:
    objects = render(helm, "everything")
    server = container(objects, "demo-specserve")
    assert server["resources"]["limits"]["nvidia.com/mig-3g.40gb"] == 4
    mounts = {mount["name"]: mount for mount in server["volumeMounts"]}
    assert mounts["engines"] == {
        "name": "engines",
        "mountPath": "/engines",
        "readOnly": True,
        "subPath": "llama",
    }
    pod = only(objects, "Deployment", "demo-specserve")["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["engines"]["persistentVolumeClaim"]["claimName"] == "engines"
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
    assert set(volumes) == set(mounts)
    cpu = container(render(helm, "cpu"), "demo-specserve")
    assert not any("nvidia" in name for name in cpu["resources"]["limits"])


@EVERY_VARIANT
def test_pods_may_do_nothing_they_need_not(helm: Helm, variant: str) -> None:
    deployments = [one for one in render(helm, variant) if one["kind"] == "Deployment"]
    assert len(deployments) == 2
    for deployment in deployments:
        pod = deployment["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        for one in pod["containers"]:
            assert one["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert one["resources"]["limits"]["memory"]


def test_probes_ask_what_the_server_answers(helm: Helm) -> None:
    server = container(render(helm, "default"), "demo-specserve")
    code = server["startupProbe"]["exec"]["command"][-1]
    compile(code, "startupProbe", "exec")
    assert "warm_up(" in code
    assert server["startupProbe"]["failureThreshold"] * 10 == 1200
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    for kind in ("readinessProbe", "livenessProbe"):
        assert server[kind]["httpGet"]["port"] == "http"


def test_a_drain_has_time_to_end(helm: Helm) -> None:
    """The launcher gives requests 30 s, and takes some more to leave nothing behind."""
    for name, least in (("demo-specserve", 40), ("demo-specserve-balancer", 5)):
        pod = only(render(helm, "default"), "Deployment", name)["spec"]["template"]["spec"]
        sleep = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert pod["terminationGracePeriodSeconds"] - sleep >= least


@EVERY_VARIANT
def test_selectors_find_their_pods_and_no_others(helm: Helm, variant: str) -> None:
    objects = render(helm, variant)
    pods = {
        one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"]
        for one in objects
        if one["kind"] == "Deployment"
    }

    def found(selector: dict[str, str]) -> list[str]:
        return [name for name, labels in pods.items() if selector.items() <= labels.items()]

    server, balancer = "demo-specserve", "demo-specserve-balancer"
    assert found(only(objects, "Service", f"{server}-replicas")["spec"]["selector"]) == [server]
    assert found(only(objects, "Service", server)["spec"]["selector"]) == [balancer]
    for kind in ("Deployment", "PodDisruptionBudget"):
        for name in (server, balancer):
            selector = only(objects, kind, name)["spec"]["selector"]["matchLabels"]
            assert found(selector) == [name]


def test_the_balancer_gets_the_tested_configuration_with_the_replicas_address(
    helm: Helm,
) -> None:
    objects = render(helm, "default")
    text = only(objects, "ConfigMap", "demo-specserve-balancer")["data"]["envoy.yaml"]
    expected = ENVOY_CONFIG.read_text(encoding="utf-8").replace(
        "address: server,", "address: demo-specserve-replicas,"
    )
    assert text.strip() == expected.strip()
    assert text.count("demo-specserve-replicas") == 2


# -- who may talk to whom ----------------------------------------------------------------------


def test_replicas_hear_the_balancer_and_prometheus_only(helm: Helm) -> None:
    objects = render(helm, "default")
    policy = only(objects, "NetworkPolicy", "demo-specserve")["spec"]
    by_ports = {
        tuple(port["port"] for port in rule["ports"]): rule["from"] for rule in policy["ingress"]
    }
    assert set(by_ports) == {("http", "grpc"), ("metrics",)}
    ((balancer,), (prometheus,)) = by_ports.values()
    labels = only(objects, "Deployment", "demo-specserve-balancer")["spec"]["template"]["metadata"]
    assert balancer["podSelector"]["matchLabels"].items() <= labels["labels"].items()
    assert "component" in " ".join(balancer["podSelector"]["matchLabels"])
    assert "namespaceSelector" in prometheus
    assert policy["egress"] == []
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}


def test_the_balancer_reaches_replicas_and_names_only(helm: Helm) -> None:
    policy = only(render(helm, "default"), "NetworkPolicy", "demo-specserve-balancer")["spec"]
    assert [[port["port"] for port in rule["ports"]] for rule in policy["egress"]] == [
        ["http", "grpc"],
        [53, 53],
    ]
    assert "from" not in policy["ingress"][0]
    narrowed = only(render(helm, "everything"), "NetworkPolicy", "demo-specserve-balancer")
    assert (
        narrowed["spec"]["ingress"][0]["from"] == VARIANTS["everything"]["networkPolicy"]["clients"]
    )


# -- scaling and watching ----------------------------------------------------------------------


def test_autoscaling_takes_the_replicas_out_of_the_deployment(helm: Helm) -> None:
    for variant, replicas in (("default", 2), ("hpa", None), ("keda", None)):
        deployment = only(render(helm, variant), "Deployment", "demo-specserve")
        assert deployment["spec"].get("replicas") == replicas


def test_the_hpa_scales_on_a_metric_that_exists(helm: Helm) -> None:
    hpa = only(render(helm, "hpa"), "HorizontalPodAutoscaler", "demo-specserve")["spec"]
    assert [m["pods"]["metric"]["name"] for m in hpa["metrics"]] == ["specserve_requests_waiting"]
    assert "specserve_requests_waiting" in published()
    assert hpa["scaleTargetRef"]["name"] == "demo-specserve"


def test_keda_scales_on_metrics_that_exist(helm: Helm) -> None:
    scaled = only(render(helm, "keda"), "ScaledObject", "demo-specserve")["spec"]
    used = [metrics_of(trigger["metadata"]["query"]) for trigger in scaled["triggers"]]
    assert set().union(*used) <= published()
    for trigger in scaled["triggers"]:
        assert 'namespace="ml"' in trigger["metadata"]["query"]
        assert float(trigger["metadata"]["threshold"]) > 0
        assert (trigger["type"], trigger["metricType"]) == ("prometheus", "AverageValue")


def test_rules_and_dashboard_are_those_of_compose(helm: Helm) -> None:
    objects = render(helm, "everything")
    rule = only(objects, "PrometheusRule", "demo-specserve")
    assert rule["spec"] == yaml.safe_load((CHART / "files" / "rules.yaml").read_text())
    assert rule["metadata"]["labels"]["release"] == "kube-prometheus"
    for group in rule["spec"]["groups"]:
        for one in group["rules"]:
            assert metrics_of(one["expr"]) <= published() | {"up"}
    dashboard = only(objects, "ConfigMap", "demo-specserve-dashboard")["data"]["specserve.json"]
    assert dashboard.strip() == (CHART / "files" / "dashboard.json").read_text().strip()
    monitor = only(objects, "PodMonitor", "demo-specserve")["spec"]
    assert monitor["podMetricsEndpoints"][0]["port"] == "metrics"
