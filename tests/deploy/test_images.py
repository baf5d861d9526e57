"""Dockerfile and compose files: what a linter and the Compose schema say, and that they fit the server that they run."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from sun_build.triton import RELEASE
from sun_client.server import DRAIN_S, Ports

from .conftest import DEPLOY, INSTALL, ROOT, SMOLLM2, program

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE = DEPLOY / "compose.yaml"


@cache
def compose() -> dict:
    return yaml.safe_load(COMPOSE.read_text())


def seconds(text: str) -> int:
    """Compose's "1m15s"."""
    return sum(int(number) * {"s": 1, "m": 60, "h": 3600}[unit] for number, unit in re.findall(r"(\d+)([smh])", text))


def instruction(name: str) -> str:
    """The last instruction of a name in the Dockerfile, its lines joined."""
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE)
    return re.findall(rf"^{name} (.*)$", joined, re.M)[-1]


def slips(file: dict) -> list[str]:
    """What the Compose specification finds wrong with a file."""
    jsonschema = pytest.importorskip("jsonschema", reason=INSTALL)
    # Found and not imported: as a program it would need more packages.
    package = importlib.util.find_spec("check_jsonschema") or pytest.skip(f"check-jsonschema is {INSTALL}")
    schema = json.loads((Path(package.origin).parent / "builtin_schemas" / "vendor" / "compose-spec.json").read_text())
    return [error.message for error in jsonschema.validators.validator_for(schema)(schema).iter_errors(file)]


def test_hadolint_finds_nothing():
    done = subprocess.run([program("hadolint"), DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_container_runs_sun_serve_itself_and_as_nobody_special():
    assert json.loads(instruction("ENTRYPOINT")) == ["/opt/sun/.venv/bin/sun"]
    assert json.loads(instruction("CMD"))[0] == "serve"
    assert instruction("USER") == "1000:1000"
    assert "/v2/health/ready" in instruction("HEALTHCHECK")
    assert instruction("EXPOSE").split() == [*(str(port) for port in vars(Ports()).values()), "8080"]


def test_compiled_kernels_lie_where_they_may_be_loaded_as_libraries():
    caches = dict(re.findall(r"(NUMBA_CACHE_DIR|TRITON_CACHE_DIR)=(\S+)", instruction("ENV")))
    assert len(set(caches.values())) == 2
    service = compose()["services"]["sun"]
    volumes = [mount.split(":")[1] for mount in service["volumes"]]
    for folder in caches.values():
        # A tmpfs of Docker's is noexec.
        assert any(Path(folder).is_relative_to(volume) for volume in volumes)
        assert not any(Path(folder).is_relative_to(mount.split(":")[0]) for mount in service["tmpfs"])


def test_its_triton_is_the_release_that_sun_setup_takes():
    # 2.51 is 24.10, and so on a month each; NVIDIA's image of another release would be left alone, for the wheel's server.
    year, month = map(int, re.search(r"^ARG TRITON=(\d+)\.(\d+)$", DOCKERFILE, re.M).groups())
    assert RELEASE == f"2.{51 + (year - 24) * 12 + month - 10}.0"


def test_its_context_has_what_it_copies_and_nothing_that_setup_makes():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    allowed = {line[1:] for line in rules if line.startswith("!")}
    assert rules[0] == "*", "what is not named stays out"
    assert {path.name for path in ROOT.glob("requirements*.txt")} & allowed == {"requirements.txt", "requirements-nodeps.txt"}
    package = re.search(r"\[tool.setuptools.package-dir\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    for path in re.findall(r'"(.+)"', package):
        assert allowed & {path, *map(str, Path(path).parents)}, f"{path} is not in the image"
    made = re.search(r"made by.*?\n(.*?)\n#", (ROOT / ".gitignore").read_text(), re.S)[1].split()
    assert {line.strip("/") for line in made} <= set(rules)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_fit_the_specification(name):
    assert slips(yaml.safe_load((DEPLOY / name).read_text())) == []


def test_the_specification_would_find_a_slip():
    assert "shm-size" in slips({"services": {"sun": {"image": "sun-triton", "shm-size": "1g"}}})[0]


def test_ports_are_on_loopback_alone():
    for service in compose()["services"].values():
        assert service["ports"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_nothing_in_it_is_a_secret():
    for service in compose()["services"].values():
        assert not any(re.search("PASSWORD|TOKEN|SECRET|KEY", name) for name in service.get("environment", {}))


def test_shared_memory_holds_the_kv_of_all_requests_beyond_the_queue():
    pools = [re.search(r'"kv_tokens" value \{ string_value: "(\d+)"', path.read_text())[1] for path in ROOT.glob("model_repository/decode_[01]/config.pbtxt")]
    need = sum(map(int, pools)) * SMOLLM2.kv_bytes(1, 4) + 64 * 2**20
    assert len(pools) == 2 and int(compose()["services"]["sun"]["shm_size"].removesuffix("m")) * 2**20 >= need


def test_it_waits_longer_than_sun_serve_lets_streams_end():
    assert seconds(compose()["services"]["sun"]["stop_grace_period"]) >= DRAIN_S + 5


def test_what_it_mounts_is_there_and_its_names_are_defined():
    volumes = compose()["volumes"]
    for service in compose()["services"].values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert (DEPLOY / source).is_file() if source.startswith(".") else source in volumes, mount
        assert set(service.get("depends_on", [])) <= compose()["services"].keys()


def test_decode_workers_of_the_gpu_image_run_on_gpus():
    mounts = [mount.rsplit(":", 2) for mount in yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())["services"]["sun"]["volumes"]]
    assert [target for _, target, _ in mounts] == [f"/opt/sun/model_repository/decode_{k}/config.pbtxt" for k in (0, 1)]
    for gpu, source in ((0, mounts[0][0]), (0, mounts[1][0].replace("${SUN_SECOND_GPU:-0}", "0")), (1, mounts[1][0].replace("${SUN_SECOND_GPU:-0}", "1"))):
        text = (DEPLOY / source).read_text()
        assert f"instance_group [{{ kind: KIND_GPU, count: 1, gpus: [ {gpu} ] }}]" in text and '"executor" value { string_value: "cuda" }' in text
        # By which /dev/shm is sized.
        assert re.search(r'"kv_tokens".*', text)[0] == re.search(r'"kv_tokens".*', (ROOT / "model_repository" / "decode_0" / "config.pbtxt").read_text())[0]


def test_monitoring_scrapes_the_server_under_the_name_that_the_alerts_ask_for():
    prometheus = yaml.safe_load((DEPLOY / "monitoring" / "prometheus.yml").read_text())
    job, = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"sun:{Ports().metrics}"]}]
    assert f'up{{job="{job["job_name"]}"}}' in (ROOT / "client" / "monitoring" / "alerts.yml").read_text()
    targets = {mount.split(":")[1] for mount in compose()["services"]["prometheus"]["volumes"]}
    assert set(prometheus["rule_files"]) <= targets
    provider, = yaml.safe_load((DEPLOY / "monitoring" / "dashboards.yml").read_text())["providers"]
    assert any(mount.split(":")[1].startswith(provider["options"]["path"]) for mount in compose()["services"]["grafana"]["volumes"])
    source, = yaml.safe_load((DEPLOY / "monitoring" / "datasource.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and source["isDefault"]
