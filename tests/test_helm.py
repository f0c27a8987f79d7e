"""The Helm chart: rendered by Helm's own library, held against Kubernetes' schemas, and against jaxserve's flags, routes and discovery."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from helm_python.chart import Chart, lint
from helm_python.errors import HelmError
from live_front_end import LiveFrontEnd

from jaxserve.cli.serve import read_options
from jaxserve.hosts.discovery import DEFAULT_PORT

CHART = Path(__file__).parent.parent / "deploy" / "helm" / "jaxserve"
KUBERNETES = "1.37"
ALL = {
    "model": {"id": "org/model", "revision": "main", "servedName": "m"},
    "image": {"repository": "registry.local/jaxserve", "tag": "1"},
    "flags": {"max-total-tokens": 2000000, "tgi-strict": True, "cuda-memory-fraction": 0.85, "dtype": "bfloat16", "json-output": False},
    "hubToken": {"secret": "hub"},
    "apiKey": {"secret": "api"},
    "podMonitor": {"enabled": True, "labels": {"team": "a"}},
    "podLabels": {"llm-d.ai/engine-type": "vllm"},
    "podAnnotations": {"a": "b"},
    "nodeSelector": {"gpu": "h200"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "priorityClassName": "high",
    "imagePullSecrets": [{"name": "pull"}],
    "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
    "weights": {"enabled": False},
    "compileCache": {"existingClaim": "compiled", "accessMode": "ReadWriteMany", "storageClass": "nfs"},
    "service": {"type": "LoadBalancer", "port": 8080},
}
VALUES: dict[str, dict[str, Any]] = {
    "default": {},
    "cpu": {"gpus": 0, "replicas": 3},
    "all": ALL,
    "hosts": {"hosts": 2, "gpus": 8, "podMonitor": {"enabled": True}},
    "replicas over hosts": {"hosts": 2, "gpus": 8, "mesh": "4x4"},
    "all hosts": {**ALL, "hosts": 4, "gpus": 4, "mesh": "1x16", "clusterSecret": {"secret": "own"}, "networkPolicy": {"enabled": False}},
}
# What is used of the two kinds that Kubernetes itself does not know; their own schemas are not in any package here.
CUSTOM = {
    "LeaderWorkerSet": {
        "required": ["replicas", "leaderWorkerTemplate"],
        "additionalProperties": False,
        "properties": {
            "replicas": {"type": "integer"},
            "startupPolicy": {"enum": ["LeaderCreated", "LeaderReady"]},
            "leaderWorkerTemplate": {
                "required": ["size", "workerTemplate"],
                "additionalProperties": False,
                "properties": {
                    "size": {"type": "integer", "minimum": 1},
                    "restartPolicy": {"enum": ["RecreateGroupOnPodRestart", "None"]},
                    "leaderTemplate": {"type": "object"},
                    "workerTemplate": {"type": "object"},
                },
            },
        },
    },
    "PodMonitor": {
        "required": ["selector", "podMetricsEndpoints"],
        "additionalProperties": False,
        "properties": {
            "selector": {"required": ["matchLabels"]},
            "podMetricsEndpoints": {
                "items": {
                    "additionalProperties": False,
                    "properties": {
                        "port": {"type": "string"},
                        "path": {"type": "string"},
                        "interval": {"pattern": r"^\d+[smh]$"},
                        "authorization": {"required": ["credentials"]},
                    },
                }
            },
        },
    },
}


@pytest.fixture(scope="module")
def chart() -> Iterator[Chart]:
    with Chart.load(CHART) as loaded:
        yield loaded


def rendered(chart: Chart, values: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What is applied to a cluster, by kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for text in chart.render(values, name="llm", namespace="serving").values():
        for document in yaml.safe_load_all(text):
            if document:
                found.setdefault(document["kind"], []).append(document)
    return found


def pods(documents: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The pod templates: the one that serves, then a worker's."""
    for deployment in documents.get("Deployment", ()):
        return [deployment["spec"]["template"]]
    template = documents["LeaderWorkerSet"][0]["spec"]["leaderWorkerTemplate"]
    return [template["leaderTemplate"], template["workerTemplate"]]


@pytest.mark.parametrize("name", VALUES)
def test_what_is_rendered_is_what_kubernetes_takes(chart: Chart, name: str):
    documents = rendered(chart, VALUES[name])
    for kind, each in ((kind, each) for kind, found in documents.items() for each in found):
        if kind in CUSTOM:
            jsonschema.validate(each["spec"], CUSTOM[kind])
        else:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)
    for template in pods(documents):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}, KUBERNETES, strict=True
        )
    hosts = VALUES[name].get("hosts", 1)
    expected = {"Service"} | ({"LeaderWorkerSet"} if hosts > 1 else {"Deployment"})
    expected |= {"NetworkPolicy", "Secret"} if "hosts" in VALUES[name] and "networkPolicy" not in VALUES[name] else set()
    expected |= {"PodMonitor"} if "podMonitor" in VALUES[name] else set()
    expected |= {"PersistentVolumeClaim"} if "weights" not in VALUES[name] else set()
    assert set(documents) == expected
    for group in documents.get("LeaderWorkerSet", ()):  # with several replicas, each pod restarts for itself
        policy = group["spec"]["leaderWorkerTemplate"]["restartPolicy"]
        assert policy == ("None" if name == "replicas over hosts" else "RecreateGroupOnPodRestart")


@pytest.mark.parametrize("name", VALUES)
def test_selectors_choose_the_pods_that_serve(chart: Chart, name: str):
    documents = rendered(chart, VALUES[name])
    serving, *workers = pods(documents)
    labels = serving["metadata"]["labels"] | ({"leaderworkerset.sigs.k8s.io/worker-index": "0"} if workers else {})
    selectors = [documents["Service"][0]["spec"]["selector"]]
    selectors += [each["spec"]["selector"]["matchLabels"] for kind in ("PodMonitor", "Deployment") for each in documents.get(kind, ())]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not workers or not selector.items() <= workers[0]["metadata"]["labels"].items()
    claims = {claim["metadata"]["name"] for claim in documents.get("PersistentVolumeClaim", ())}
    for template in (serving, *workers):
        (container,) = template["spec"]["containers"]
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        wanted = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if "persistentVolumeClaim" in volume}
        assert wanted <= claims | {"compiled"}
        assert ("readinessProbe" in container) == ("ports" in container) == (template is serving)


@pytest.mark.parametrize("name", VALUES)
def test_jaxserve_understands_its_flags(chart: Chart, name: str):
    """The arguments and variables of each pod, with what LeaderWorkerSet adds, as the launcher reads them."""
    values = VALUES[name]
    hosts, templates = values.get("hosts", 1), pods(rendered(chart, values))
    for index, template in enumerate(templates):
        (container,) = template["spec"]["containers"]
        environment = {each["name"]: each.get("value", "a secret of forty characters, more or less") for each in container["env"]}
        if hosts > 1:
            environment |= {"LWS_LEADER_ADDRESS": "llm-0.llm.serving", "LWS_GROUP_SIZE": str(hosts), "LWS_WORKER_INDEX": str(index)}
        model, engine, server, found = read_options(container["args"], environment)
        gpus = values.get("gpus", 1)
        assert (
            engine.mesh == values.get("mesh", f"1x{max(1, gpus * hosts)}")
            and server.port == container.get("ports", [{"containerPort": 3000}])[0]["containerPort"]
        )
        assert (found.num_hosts, found.host_index) == ((hosts, index) if hosts > 1 else (1, None))
        assert hosts == 1 or found.coordinator == f"llm-0.llm.serving:{DEFAULT_PORT}"
        assert container["resources"]["limits"].get("nvidia.com/gpu", 0) == gpus
        assert ("JAX_PLATFORMS" in environment) == (gpus == 0)
        assert template["spec"]["terminationGracePeriodSeconds"] > server.graceful_termination_timeout + 5
        if "flags" in values:
            assert (model.model_id, model.revision, server.served_model_name, model.dtype) == ("org/model", "main", "m", "bfloat16")
            assert (engine.max_total_tokens, engine.cuda_memory_fraction, server.tgi_strict) == (2000000, 0.85, True)
            assert not server.json_output and server.api_key is not None


def test_probes_and_monitor_ask_for_what_there_is(chart: Chart, front_end: LiveFrontEnd):
    documents = rendered(chart, VALUES["all"])
    (container,) = pods(documents)[0]["spec"]["containers"]
    paths = [container[probe]["httpGet"]["path"] for probe in ("livenessProbe", "readinessProbe")]
    paths += [endpoint["path"] for endpoint in documents["PodMonitor"][0]["spec"]["podMetricsEndpoints"]]
    assert [front_end.client.get(path).status_code for path in paths] == [200] * 3


@pytest.mark.parametrize("hosts", [1, 2])
def test_the_monitor_sends_the_key_that_the_server_asks_for(chart: Chart, hosts: int):
    values = {"hosts": hosts, "gpus": 1, "podMonitor": {"enabled": True}}
    (endpoint,) = rendered(chart, values)["PodMonitor"][0]["spec"]["podMetricsEndpoints"]
    assert "authorization" not in endpoint
    documents = rendered(chart, {**values, "apiKey": {"secret": "keys", "key": "of-clients"}})
    (endpoint,) = documents["PodMonitor"][0]["spec"]["podMetricsEndpoints"]
    (container,) = pods(documents)[0]["spec"]["containers"]
    (asked,) = [each["valueFrom"]["secretKeyRef"] for each in container["env"] if each["name"] == "API_KEY"]
    assert endpoint["authorization"] == {"type": "Bearer", "credentials": asked}
    assert asked == {"name": "keys", "key": "of-clients"}


@pytest.mark.parametrize(
    "values",
    [
        {"hosts": 0},
        {"gpus": -1},
        {"mesh": "four"},
        {"flags": {"port": 80}},
        {"flags": {"api-key": "x"}},
        {"model": {"id": ""}},
        {"modle": {"id": "x"}},
        {"weights": {"accessMode": "Any"}},
    ],
    ids=str,
)
def test_wrong_values_are_refused(chart: Chart, values: dict[str, Any]):
    with pytest.raises(HelmError):
        chart.validate_schema(values)
    with pytest.raises(HelmError):
        chart.render(values)


def test_lint_finds_nothing():
    told = lint(CHART)
    assert told["errors"] == [] and [message for message in told["messages"] if message["severity"] > 1] == []
