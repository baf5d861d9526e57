"""The root of a repository: the folder that holds `model_repository/`, `backends/` and `build/`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sun.model.manifest import BASE_FILE, BaseManifest
from sun_client.errors import SunError


@dataclass(frozen=True)
class Root:
    """A root's folders."""

    path: Path

    @classmethod
    def find(cls, given: Path | None = None) -> Root:
        """``given``, else the checkout that this package lies in, else the working directory. Raises SunError if it is none."""
        candidates = [given] if given is not None else [Path(__file__).resolve().parents[2], Path.cwd()]
        for path in candidates:
            if (path / "model_repository").is_dir():
                return cls(path.resolve())
        raise SunError(f"no model_repository in {' or '.join(map(str, candidates))}: name the repository with --root")

    @property
    def models(self) -> Path:
        """What `tritonserver --model-repository` serves."""
        return self.path / "model_repository"

    @property
    def base(self) -> Path:
        """The base model."""
        return self.path / "build" / "base"

    def manifest(self) -> BaseManifest:
        """What the base says about itself. Raises FileNotFoundError if there is none, ValueError if it is not readable."""
        try:
            return BaseManifest.load(self.base)
        except ValueError as error:
            raise ValueError(f"{self.base / BASE_FILE} is not readable ({error}): `sun setup` makes it anew") from error

    @property
    def shipped(self) -> Path:
        """The tasks that come with this repository, a folder each."""
        return self.path / "build" / "tasks"
