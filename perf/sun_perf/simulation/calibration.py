"""Measured times of a machine, in one JSON file, and the fits made from them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from sun_perf.simulation.costs import PrefillRow, PrefillTime, StepRow, StepTime

T = TypeVar("T")


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """What `python -m sun_perf.calibrate` writes. token_budget: of the measured prefill engine."""

    machine: dict[str, str | int]
    commit: str
    steps: list[StepRow]
    prefill: list[PrefillRow]
    token_budget: int

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a file. Raises ValueError naming it and the field at fault."""
        if not path.is_file():
            raise ValueError(f"calibration: there is no file {path}; `python -m sun_perf.calibrate` makes one")
        return read(path, cls)

    def step_time(self, scheme: str, threads: int) -> StepTime:
        """The fit of a scheme's decode steps. Raises ValueError naming what was measured, and what measures more, if these were not."""
        return StepTime.from_rows(self._rows("scheme", self.steps, scheme, threads))

    def prefill_time(self, threads: int) -> PrefillTime:
        """The fit of the prefill module's passes."""
        return PrefillTime.from_rows(self._rows("threads", self.prefill, None, threads), self.token_budget)

    @staticmethod
    def _rows(field: str, rows: list, scheme: str | None, threads: int) -> list:
        found = [row for row in rows if (scheme is None or row.scheme == scheme) and row.threads == threads]
        if not found:
            known = sorted({f"{row.scheme} on {row.threads}" if scheme else f"{row.threads}" for row in rows})
            wanted = f"scheme {scheme} on {threads} threads" if scheme else f"prefill on {threads} threads"
            schemes = " ".join(sorted({row.scheme for row in rows} | {scheme})) if scheme else "fp32"
            raise ValueError(
                f"{field}: {wanted} was not measured; the calibration has {', '.join(known) or 'nothing'}. Measure anew with "
                f"`python -m sun_perf.calibrate --scheme {schemes} --threads {threads}`")
        return found


def read(path: Path, kind: type[T]) -> T:
    """A JSON file as ``kind``. Raises ValueError naming the file and the field at fault."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: {error}") from error
