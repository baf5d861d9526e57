"""`sun decode`: the decode module that all tasks share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sun_client.cli_options import RootOption

app = typer.Typer(no_args_is_help=True, help="Replace the decode module of a running server.")


@app.callback()
def group() -> None:
    """So that one command is a command of its own."""


@app.command("replace")
def replace(
    scheme: Annotated[str | None, typer.Option(
        help="Number format: fp32, bf16, int8, int4, nf4, bnb-int8 or bnb-nf4; where executor is cuda: fp32, bf16, int8, int4, fp8 or bnb-nf4. Default: as it is.", show_default=False)] = None,
    weights: Annotated[Path | None, typer.Option(
        help="Folder of a checkpoint of the same base. Default: as it is; build/base itself sets it back.", show_default=False)] = None,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that a worker's sequences have to end before they are moved, or fail.")] = 120.0,
    root: RootOption = None,
) -> None:
    """Replace the decode module worker by worker, while the server serves; without options, load what is on disk anew.

    Each worker takes no new sequences, lets those that it has end, and is loaded with the new setting; then the next. A sequence that has begun
    never goes on with another module. If one does not load, it is put back as it was, and the rest stay as they are.
    """
    from sun_build.config_file import parameter, set_parameter
    from sun_client import show
    from sun_client.control import Control
    from sun_client.replacement import Replacement
    from sun_client.root import Root

    place, values = Root.find(root), {}
    configs = {path.parent.name: path for path in sorted(place.models.glob("decode_*/config.pbtxt"))}
    if scheme is not None:
        from sun.decode.executors import check

        for worker in configs:
            try:
                check(parameter(place.models, worker, "executor") or "cpu", scheme)
            except ValueError as error:
                raise ValueError(f"--scheme: {worker}: {error}") from error
        values["scheme"] = scheme
    if weights is not None:
        if not weights.is_dir():
            raise ValueError(f"--weights: {weights} is not a folder")
        values["weights"] = "" if weights.resolve() == place.base.resolve() else str(weights.resolve())
    with show.working("checking that module and tasks are of one base"), show.quiet_libraries():
        from sun_build.decode_module import check_tasks

        check_tasks(place.models, place.base, weights)
    controls = list(Control.running(place.path))
    if len(controls) > 1:
        ports = ", ".join(str(control.http_port) for control in controls)
        raise ValueError(f"servers on ports {ports} share these workers' settings: stop all but one")
    if controls:
        Replacement(controls[0], configs, values, grace, show.say).run()
        print(f"The server on port {controls[0].http_port} decodes with it now.")
        return
    for config in configs.values():
        for name, value in values.items():
            set_parameter(config, name, value)
    print("No server of this repository runs; the next one decodes with it.")
