"""The Helm chart, rendered by Helm: valid manifests of Kubernetes, which fit the server and each other."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from sun.router.meter import METRICS
from sun_client.server import DRAIN_S, Ports

from .conftest import CHART, DEPLOY, INSTALL, ROOT, SMOLLM2

VERSIONS = ["1.25", "1.29", "1.34"]
"""Of Kubernetes: Chart.yaml's oldest, and those that the schemas' package has further."""
FULL = {
    "tasks": {"names": ["bash", "math"], "added": [{"name": "legal", "weights": "legal-v3"}], "volume": {"persistentVolumeClaim": {"claimName": "sun-tasks"}}},
    "workers": {"count": 3, "parameters": {"kv_tokens": 1048576, "scheme": "int8"}},
    "prefill": {"parameters": {"token_budget": 1024}},
    "router": {"parameters": {"policy": "round_robin", "deadline_s": 0.5}},
    "resources": {"limits": {"nvidia.com/gpu": 1}},
    "autoscaling": {"enabled": True}, "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "imagePullSecrets": [{"name": "registry"}], "podAnnotations": {"team": "llm"}, "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}], "affinity": {"podAntiAffinity": {}},
}
"""Every value that renders something of its own."""
LAY_OUT = CHART / "files" / "lay-out.sh"


def pod(manifests: dict[str, dict]) -> dict:
    return manifests["Deployment"]["spec"]["template"]["spec"]


def container(manifests: dict[str, dict]) -> dict:
    made, = pod(manifests)["containers"]
    return made


def shm_mib(manifests: dict[str, dict]) -> int:
    volume = next(each for each in pod(manifests)["volumes"] if each["name"] == "shm")
    assert volume["emptyDir"]["medium"] == "Memory"
    return int(volume["emptyDir"]["sizeLimit"].removesuffix("Mi"))


def refusal(helm, values: dict, tmp_path: Path) -> str:
    """What Helm says to values that it does not render."""
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    done = helm("template", "demo", CHART, "--values", tmp_path / "values.yaml")
    assert done.returncode != 0
    return done.stderr


def test_helm_lint_finds_nothing(helm):
    done = helm("lint", "--strict", CHART)
    assert done.returncode == 0 and "[WARNING]" not in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("values", [{}, FULL], ids=["defaults", "everything"])
def test_manifests_fit_the_schemas_of_kubernetes(template, version, values):
    kubernetes = pytest.importorskip("kubernetes_validate", reason=INSTALL)
    manifests = template(values)
    assert manifests.keys() == {"Deployment", "Service", "ConfigMap", "PodDisruptionBudget", "NetworkPolicy"} | (
        {"HorizontalPodAutoscaler", "ServiceMonitor"} if values else set())
    manifests.pop("ServiceMonitor", None)  # the Prometheus operator's own, which Kubernetes has no schema for
    for manifest in manifests.values():
        kubernetes.validate(manifest, version, strict=True)


def test_the_schemas_would_find_a_slip(template):
    kubernetes = pytest.importorskip("kubernetes_validate", reason=INSTALL)
    deployment = json.loads(json.dumps(template()["Deployment"]))
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 90
    with pytest.raises(kubernetes.ValidationError, match="terminationGracePeriod"):
        kubernetes.validate(deployment, VERSIONS[-1], strict=True)


def test_all_that_selects_pods_selects_these(template):
    manifests = template(FULL)
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [manifests["Service"]["spec"]["selector"], manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
                 *(manifests[kind]["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget"))]
    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    service = manifests["ServiceMonitor"]["spec"]
    assert service["selector"]["matchLabels"].items() <= manifests["Service"]["metadata"]["labels"].items()
    # The alert rules ask for this job.
    assert manifests["Service"]["metadata"]["labels"][service["jobLabel"]] == "sun"
    target = manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", manifests["Deployment"]["metadata"]["name"])


def test_ports_are_triton_s_and_the_gateway_s_and_go_by_name(template):
    manifests = template(FULL)
    ports = {port["name"]: port["containerPort"] for port in container(manifests)["ports"]}
    assert ports == {**vars(Ports()), "openai": 8080}
    assert {port["targetPort"] for port in manifests["Service"]["spec"]["ports"]} == ports.keys()
    assert {port["port"] for rule in manifests["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]} == ports.keys()
    assert manifests["ServiceMonitor"]["spec"]["endpoints"][0]["port"] in ports


def test_it_listens_for_others_and_they_are_few(template):
    manifests = template()
    arguments = container(manifests)["args"]
    assert arguments[arguments.index("--openai-port") + 1] == "8080"
    assert arguments[arguments.index("--host") + 1] == "0.0.0.0"
    policy = manifests["NetworkPolicy"]["spec"]
    assert policy["egress"] == [] and set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert all(rule["from"] for rule in policy["ingress"])


def test_containers_can_do_little(template):
    spec = pod(template(FULL))
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000
    assert spec["automountServiceAccountToken"] is False
    for each in (*spec["containers"], *spec["initContainers"]):
        assert each["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        writable = {mount["mountPath"] for mount in each["volumeMounts"] if not mount.get("readOnly")}
        assert writable <= {"/srv/sun", "/dev/shm", "/tmp"}
        assert {mount["name"] for mount in each["volumeMounts"]} <= {volume["name"] for volume in spec["volumes"]}


def test_compiled_kernels_have_folders_of_the_root_s(template):
    caches = {each["name"]: each["value"] for each in container(template())["env"]}
    assert caches == {"NUMBA_CACHE_DIR": "/srv/sun/numba", "TRITON_CACHE_DIR": "/srv/sun/triton"}


def test_a_pod_ends_after_its_streams_may(template):
    sleep = int(container(template())["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod(template())["terminationGracePeriodSeconds"] >= sleep + DRAIN_S + 5


def test_probes_ask_triton_and_the_router(template):
    made = container(template({"startupSeconds": 61}))
    assert made["livenessProbe"]["httpGet"] == {"path": "/v2/health/live", "port": "http"}
    urls = [word for word in made["readinessProbe"]["exec"]["command"] if word.startswith("http")]
    assert urls == [f"http://127.0.0.1:{Ports().http}{path}" for path in ("/v2/health/ready", "/v2/models/sun/ready")]
    startup = made["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] == 65


@pytest.mark.parametrize("count, tokens", [(1, 4096), (2, 16384), (3, 1048576)])
def test_shared_memory_holds_the_kv_of_all_requests_beyond_the_queue(template, count, tokens):
    made = shm_mib(template({"workers": {"count": count, "parameters": {"kv_tokens": tokens}}}))
    assert 64 <= made - count * tokens * SMOLLM2.kv_bytes(1, 4) / 2**20 < 98


def test_shared_memory_follows_the_router_s_own_bound(template):
    made = shm_mib(template({"router": {"parameters": {"max_running_tokens": 65536}}}))
    assert 64 <= made - 65536 * SMOLLM2.kv_bytes(1, 4) / 2**20 < 98
    assert shm_mib(template({"router": {"parameters": {"max_running_tokens": 0}}})) == shm_mib(template())


def test_settings_are_config_pbtxt_s(template):
    data = template(FULL)["ConfigMap"]["data"]

    def parameters(name: str) -> dict[str, str]:
        return dict(re.findall(r'^parameters \{ key: "(\w+)" value \{ string_value: "(.*)" \} \}$', data[name], re.M))

    assert parameters("decode.pbtxt") == {"kv_tokens": "1048576", "max_batch": "64", "threads": "1", "scheme": "int8"}
    assert parameters("sun.pbtxt") == {"policy": "round_robin", "deadline_s": "0.5"}
    assert parameters("prefill.pbtxt") == {"token_budget": "1024"}
    for ours, file in (("decode.pbtxt", "decode_0"), ("sun.pbtxt", "sun")):
        committed = (ROOT / "model_repository" / file / "config.pbtxt").read_text()
        lines = [line for line in data[ours].splitlines() if line.startswith(("backend", "instance_group"))]
        assert lines == [line for line in committed.splitlines() if line.startswith(("backend", "instance_group"))]


def groups(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("instance_group")]


def test_a_gpu_is_in_the_models_settings_and_in_what_the_pod_asks_for(template):
    manifests = template({"workers": {"device": "gpu", "count": 3, "parameters": {"scheme": "bf16"}}})
    data, limits = manifests["ConfigMap"]["data"], container(manifests)["resources"]["limits"]
    assert groups(data["decode.pbtxt"]) == ["instance_group [{ kind: KIND_GPU, count: 1, gpus: [ WORKER ] }]"] and groups(data["prefill.pbtxt"]) == []
    assert '"executor" value { string_value: "cuda" }' in data["decode.pbtxt"] and "KIND_CPU" in data["sun.pbtxt"]
    assert limits == {"memory": "8Gi", "nvidia.com/gpu": 3}
    manifests = template({"prefill": {"device": "gpu", "parameters": {"transport": "shm"}}})
    assert groups(manifests["ConfigMap"]["data"]["prefill.pbtxt"]) == ["instance_group [{ kind: KIND_GPU, count: 1, gpus: [ 0 ] }]"]
    assert "executor" not in manifests["ConfigMap"]["data"]["decode.pbtxt"] and container(manifests)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in str(container(template())["resources"])
    asked = template({"workers": {"device": "gpu"}, "resources": {"limits": {"nvidia.com/gpu": 8}}})
    assert container(asked)["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_each_worker_gets_a_gpu_of_its_own_and_a_prefill_module_one_group(template, laid_out, tmp_path):
    data = template({"workers": {"device": "gpu"}, "prefill": {"device": "gpu"}})["ConfigMap"]["data"]
    for prefill in tmp_path.glob("image/model_repository/prefill_*/config.pbtxt"):
        prefill.write_text('backend: "sun_prefill"\ninstance_group [{ kind: KIND_CPU, count: 1 }]\n')
    for name in ("decode", "prefill"):
        (tmp_path / "settings" / f"{name}.pbtxt").write_text(data[f"{name}.pbtxt"])
    done = laid_out()
    assert done.returncode == 0, done.stderr
    made = {path.parent.name: groups(path.read_text()) for path in tmp_path.glob("root/model_repository/*/config.pbtxt")}
    on = "instance_group [{{ kind: KIND_GPU, count: 1, gpus: [ {} ] }}]".format
    assert (made["decode_0"], made["decode_1"], made["prefill_math"], made["prefill_bash"]) == ([on(0)], [on(1)], [on(0)], [on(0)])


def test_other_settings_are_other_pods(template):
    def checksum(values: dict) -> str:
        return template(values)["Deployment"]["spec"]["template"]["metadata"]["annotations"]["checksum/settings"]

    assert checksum({}) == checksum({"replicas": 3}) != checksum({"workers": {"count": 2, "parameters": {"scheme": "int8"}}})


def test_the_autoscaler_asks_for_figures_that_there_are_and_the_adapter_gives(template):
    manifests = template(FULL)
    assert "replicas" not in manifests["Deployment"]["spec"]
    asked = {metric["pods"]["metric"]["name"]: metric["pods"]["target"]["averageValue"] for metric in manifests["HorizontalPodAutoscaler"]["spec"]["metrics"]}
    assert asked == {"sun_num_requests_waiting": "4", "sun_num_requests_running": "24"}
    assert asked.keys() <= METRICS.keys()
    rules = yaml.safe_load((DEPLOY / "helm" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert {rule["seriesQuery"].split("{")[0] for rule in rules} == asked.keys()


@pytest.mark.parametrize("values, words", [
    ({"layout": "split"}, "layout: split is not possible yet.*transport between hosts"),
    ({"layout": "both"}, "layout"),
    ({"tasks": {"added": [{"name": "legal", "weights": "legal"}]}}, "tasks.volume"),
    ({"tasks": {"names": ["a b"]}}, "tasks/names/0"),
    ({"autoscaling": {"enabled": True, "minReplicas": 5}}, "autoscaling.minReplicas: 5 is more than maxReplicas, 4"),
    ({"worker": {"count": 3}}, "worker"),
    ({"workers": {"count": 0}}, "workers/count"),
    ({"workers": {"device": "tpu"}}, "workers/device"),
    ({"prefill": {"parameters": {"executor": "cuda"}}}, "prefill.device: must be gpu for prefill.parameters.executor cuda"),
    ({"terminationGracePeriodSeconds": 30}, "terminationGracePeriodSeconds"),
])
def test_what_cannot_be_is_refused_by_name(helm, tmp_path, values, words):
    assert re.search(words, refusal(helm, values, tmp_path), re.S)


@pytest.fixture
def laid_out(tmp_path):
    """laid_out(**environment) -> the finished script, on an image of small files; the root is tmp_path / "root"."""
    image = tmp_path / "image"
    for folder in ("backends", "build/base", *(f"model_repository/{name}/1" for name in (
            "sun", "tokenize", "decode_0", "decode_1", "prefill_bash", "bash", "prefill_math", "math"))):
        (image / folder).mkdir(parents=True)
    for model in (image / "model_repository").iterdir():
        (model / "config.pbtxt").write_text(f"# the image's {model.name}\n")
    (tmp_path / "settings").mkdir()
    for name in ("sun", "decode", "prefill"):
        (tmp_path / "settings" / f"{name}.pbtxt").write_text(f"# {name} of the chart\n")
    (tmp_path / "bin").mkdir()
    # In place of `sun`: does what `sun task add` leaves behind, and tells how it was asked.
    sun = tmp_path / "bin" / "sun"
    sun.write_text('#!/bin/sh\necho "$@"\nmkdir -p "$ROOT/model_repository/prefill_$3/1" "$ROOT/model_repository/$3/1"\n')
    sun.chmod(0o755)

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        settings = {"IMAGE": str(image), "ROOT": str(tmp_path / "root"), "SETTINGS": str(tmp_path / "settings"), "WEIGHTS": "/weights",
                    "WORKERS": "2", "TASKS": "", "ADDED": "", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        return subprocess.run(["sh", LAY_OUT], env=settings | environment, capture_output=True, text=True)

    return run


def models(root: Path) -> set[str]:
    return {path.name for path in (root / "model_repository").iterdir()}


def test_a_root_is_laid_out_as_the_settings_say(laid_out, tmp_path):
    done = laid_out(WORKERS="3", TASKS="math", ADDED="legal=legal-v3 ")
    assert done.returncode == 0, done.stderr
    root = tmp_path / "root"
    assert done.stdout == f"task add legal --weights /weights/legal-v3 --root {root}\n"
    assert models(root) == {"sun", "tokenize", "prefill_math", "math", "prefill_legal", "legal", "decode_0", "decode_1", "decode_2"}
    config = {path.parent.name: path.read_text() for path in root.glob("model_repository/*/config.pbtxt")}
    assert config["sun"] == "# sun of the chart\n" and config["decode_2"] == "# decode of the chart\n"
    assert config["prefill_math"] == "# the image's prefill_math\n# prefill of the chart\n" and "chart" in config["prefill_legal"]
    assert config["tokenize"] == "# the image's tokenize\n"
    assert (root / "backends").resolve() == tmp_path / "image" / "backends" and (root / "build" / "base").is_dir()


def test_all_tasks_by_default_and_again_in_a_pod_that_starts_anew(laid_out, tmp_path):
    assert laid_out(WORKERS="3").returncode == 0 and laid_out(WORKERS="1").returncode == 0
    assert models(tmp_path / "root") == {"sun", "tokenize", "prefill_math", "math", "prefill_bash", "bash", "decode_0"}
    assert (tmp_path / "root" / "model_repository" / "prefill_bash" / "config.pbtxt").read_text().count("chart") == 1


def test_a_task_that_the_image_lacks_is_named(laid_out):
    done = laid_out(TASKS="math poetry")
    assert done.returncode == 1 and "tasks.names: the image has no task poetry" in done.stderr
