"""Which tritonserver `sun setup` lays out: the wheel's, or in NVIDIA's container that one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sun_build.triton import RELEASE, install

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def server(folder: Path, name: str, *backends: str) -> Path:
    """A tree like tritonserver's, whose program says its name and arguments."""
    program = folder / "bin" / "tritonserver"
    for path in (program.parent, *(folder / "backends" / backend for backend in ("python", *backends))):
        path.mkdir(parents=True, exist_ok=True)
    program.write_text(f'#!/bin/sh\necho {name} "$@"\n')
    program.chmod(0o755)
    (folder / "backends" / "python" / "libtriton_python.so").write_text(f"library of {name}")
    (folder / "backends" / "python" / "triton_python_backend_utils.py").write_text(f"# of {name}")
    return folder


@pytest.fixture
def venv(tmp_path) -> Path:
    """A venv with the wheel's server, and a stub for this Python."""
    wheel = server(tmp_path / "venv" / "lib" / f"python{VERSION}" / "site-packages" / "pytriton" / "tritonserver", "wheel")
    stub = wheel / "python_backend_stubs" / VERSION / "triton_python_backend_stub"
    stub.parent.mkdir(parents=True)
    stub.write_text("stub")
    (tmp_path / "venv" / "bin").mkdir()
    return tmp_path / "venv"


@pytest.fixture
def nvidia(tmp_path) -> Path:
    """NVIDIA's server of the same release, with a stub for another Python."""
    folder = server(tmp_path / "nvidia", "nvidia", "onnxruntime", "tensorrt", "pytorch")
    (folder / "TRITON_VERSION").write_text(f"{RELEASE}\n")
    (folder / "backends" / "python" / "triton_python_backend_stub").write_text("stub for Python 3.10")
    return folder


def laid_out(root: Path) -> tuple[str, str, str]:
    """Whose library, helper and stub a root has."""
    folder = root / "backends" / "python"
    return tuple((folder / name).read_text() for name in ("libtriton_python.so", "triton_python_backend_utils.py", "triton_python_backend_stub"))


def runs(program: Path) -> str:
    return subprocess.run([program, "--exit-timeout-secs=3"], capture_output=True, text=True, check=True).stdout


def test_without_nvidia_s_the_wheel_s_server_runs(tmp_path, venv):
    program = install(tmp_path / "root", venv, tmp_path / "none")
    assert runs(program) == "wheel --exit-timeout-secs=3\n"
    assert laid_out(tmp_path / "root") == ("library of wheel", "# of wheel", "stub")
    assert os.listdir(tmp_path / "root" / "backends") == ["python"]


def test_in_nvidia_s_container_its_server_runs_with_the_wheel_s_stub(tmp_path, venv, nvidia):
    program = install(tmp_path / "root", venv, nvidia)
    assert runs(program) == "nvidia --exit-timeout-secs=3\n"
    assert laid_out(tmp_path / "root") == ("library of nvidia", "# of nvidia", "stub")
    # Python-based backends need a real library; the others' folders may be links.
    assert not (tmp_path / "root" / "backends" / "python" / "libtriton_python.so").is_symlink()
    assert sorted(os.listdir(tmp_path / "root" / "backends")) == ["onnxruntime", "python", "tensorrt"]
    assert (tmp_path / "root" / "backends" / "tensorrt").samefile(nvidia / "backends" / "tensorrt")


@pytest.mark.parametrize("spoil", [
    lambda folder: (folder / "TRITON_VERSION").write_text("2.53.0\n"),
    lambda folder: (folder / "TRITON_VERSION").unlink(),
    lambda folder: shutil.rmtree(folder / "bin"),
], ids=["another release", "no release", "no program"])
def test_another_server_is_left_alone(tmp_path, venv, nvidia, spoil):
    spoil(nvidia)
    assert runs(install(tmp_path / "root", venv, nvidia)).startswith("wheel")
    assert laid_out(tmp_path / "root")[0] == "library of wheel"


def test_it_may_be_run_again_and_follows_a_change(tmp_path, venv, nvidia):
    install(tmp_path / "root", venv, tmp_path / "none")
    before = (venv / "bin" / "tritonserver").stat().st_mtime_ns
    install(tmp_path / "root", venv, tmp_path / "none")
    assert (venv / "bin" / "tritonserver").stat().st_mtime_ns == before
    assert runs(install(tmp_path / "root", venv, nvidia)).startswith("nvidia")
    assert laid_out(tmp_path / "root")[0] == "library of nvidia"


def test_without_the_wheel_it_says_what_is_missing(tmp_path, nvidia):
    with pytest.raises(RuntimeError, match=f"nvidia-pytriton installed in .* for Python {VERSION}"):
        install(tmp_path / "root", tmp_path / "empty", nvidia)
