"""Make the `tritonserver` of the nvidia-pytriton wheel start like an ordinary program.

The wheel holds the server, its Python backend and one backend stub per Python version, but lays them out for its own
launcher. `install` arranges them for a plain command line:

    source .venv/bin/activate
    tritonserver --model-repository=model_repository --backend-directory=backends

In NVIDIA's container of the same release its own server is taken, which has backends for ONNX Runtime and TensorRT; that
container's stub is for Python 3.10 alone, so the stub stays the wheel's.
"""

import filecmp
import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

RELEASE = "2.51.0"
"""The wheel's Triton (24.10). Stub and server talk through shared memory, laid out by their release: no other server will do."""
NVIDIA = Path("/opt/tritonserver")
"""Where NVIDIA's containers have theirs."""
NATIVE = ("onnxruntime", "tensorrt")
"""Backends of NVIDIA's server that serve exported prefill modules."""

_WRAPPER = """\
#!/bin/sh
# Written by sun_build.triton; `sun setup` writes it again.
# The Python stub runs the first python3 on PATH, so this makes it the venv's whether or not the venv is active.
PATH={bin}${{PATH:+:$PATH}}
# The stub links to libpython, which a Python outside the system's library folders does not put on the loader's path.
LD_LIBRARY_PATH={lib}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}
export PATH LD_LIBRARY_PATH
# The HTTP front end keeps about twice a request's body on its thread's stack. The usual 8 MiB let a body of 4 MB crash
# the whole server; 64 MiB carry 30 MB.
ulimit -S -s 65536 2>/dev/null || true
exec {server} "$@"
"""


def install(repo_root: Path, venv: Path, nvidia: Path = NVIDIA) -> Path:
    """Fill `<repo_root>/backends/python/`, write `<venv>/bin/tritonserver`, and return the latter's path.

    Run it with the venv's own Python: that version's stub is chosen. It may be run again at any time, also while a
    server is up; what is right already is left alone. nvidia: where an installed server of the same `RELEASE` is taken
    instead of the wheel's, with its `NATIVE` backends linked into `<repo_root>/backends/`.
    """
    venv = Path(os.path.abspath(venv))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    wheel = venv / "lib" / f"python{version}" / "site-packages" / "pytriton" / "tritonserver"
    if not (wheel / "bin" / "tritonserver").is_file():
        raise RuntimeError(f"no tritonserver at {wheel / 'bin'}: is nvidia-pytriton installed in {venv} for Python {version}?")
    # The backend's library is linked against its own server's: these two always come from one place.
    triton = nvidia if _release(nvidia) == RELEASE else wheel
    server = triton / "bin" / "tritonserver"
    stubs = wheel / "python_backend_stubs"
    stub = stubs / version / "triton_python_backend_stub"
    if not stub.is_file():
        have = sorted((p.name for p in stubs.iterdir()), key=lambda v: [int(n) for n in v.split(".")])
        raise RuntimeError(f"nvidia-pytriton has no backend stub for Python {version}, only for {', '.join(have)}")

    target = Path(os.path.abspath(repo_root)) / "backends" / "python"
    target.mkdir(parents=True, exist_ok=True)
    # Triton refuses a symlinked library for Python-based backends, while the stub finds its own libraries by the place
    # it really lies in: one must be a copy, the other a link.
    _copy(triton / "backends" / "python" / "libtriton_python.so", target)
    _link(triton / "backends" / "python" / "triton_python_backend_utils.py", target)
    _link(stub, target)
    for name in NATIVE:
        if (backend := triton / "backends" / name).is_dir():
            _link(backend, target.parent)

    text = _WRAPPER.format(
        bin=shlex.quote(str(venv / "bin")), lib=shlex.quote(str(_libpython_dir())), server=shlex.quote(str(server))
    )
    wrapper = venv / "bin" / "tritonserver"
    if not wrapper.is_file() or wrapper.read_text() != text or not os.access(wrapper, os.X_OK):
        # Written beside and renamed, here and below: a running shell or server keeps the file it has open.
        part = wrapper.with_name(f".{wrapper.name}.part")
        part.write_text(text)
        part.chmod(0o755)
        part.replace(wrapper)
    return wrapper


def _release(server: Path) -> str | None:
    """The version of an installed server; None if there is none."""
    version = server / "TRITON_VERSION"
    return version.read_text().strip() if version.is_file() and os.access(server / "bin" / "tritonserver", os.X_OK) else None


def _libpython_dir() -> Path:
    """The folder of this Python's shared library."""
    name = sysconfig.get_config_var("INSTSONAME") or ""
    # A relocated Python (uv's, for one) still names the folder it was built for in LIBDIR.
    folders = [Path(sysconfig.get_config_var("LIBDIR") or sys.base_prefix), Path(sys.base_prefix) / "lib"]
    for folder in folders:
        if ".so" in name and (folder / name).is_file():
            return folder
    raise RuntimeError(
        f"Triton's stub needs a Python with a shared library: {name or 'libpython'} is not in "
        f"{' or '.join(map(str, folders))} (pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared)"
    )


def _copy(source: Path, folder: Path) -> None:
    copy = folder / source.name
    if copy.is_symlink() or not copy.is_file() or not filecmp.cmp(source, copy, shallow=False):
        part = folder / f".{source.name}.part"
        shutil.copyfile(source, part)
        part.replace(copy)


def _link(source: Path, folder: Path) -> None:
    link = folder / source.name
    if not link.is_symlink() or os.readlink(link) != str(source):
        part = folder / f".{source.name}.part"
        part.unlink(missing_ok=True)
        part.symlink_to(source)
        part.replace(link)
