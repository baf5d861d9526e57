"""`sun key`: the inference keys of a repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sun_client.cli_options import RootOption

app = typer.Typer(no_args_is_help=True, help="Add, remove and list the keys that clients need.")
DEFAULT = "keys.json"
HOW = """\
Keys are not asked for yet. Write this line into {config} and start the server anew:
parameters {{ key: "keys" value {{ string_value: "{name}" }} }}"""


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="What logs and metrics call it.")],
    requests_per_minute: Annotated[int | None, typer.Option(help="Most requests a minute.", show_default=False)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Most tokens a minute, of prompts and whole answers.", show_default=False)] = None,
    max_inflight: Annotated[int | None, typer.Option(help="Most requests at once.", show_default=False)] = None,
    tasks: Annotated[str | None, typer.Option(help="The tasks it may ask, separated by commas. Default: all.", show_default=False)] = None,
    priority_class: Annotated[str, typer.Option(help="The highest it may ask for: high, normal or low.")] = "normal",
    root: RootOption = None,
) -> None:
    """Make a key and print it, once: only its SHA-256 is kept. A running server knows it within a second."""
    from sun.router import key_file

    path, on, config = _place(root)
    bounds = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute, "max_inflight": max_inflight,
              "tasks": None if tasks is None else tasks.replace(",", " ").split(), "priority_class": priority_class}
    secret = key_file.add(path, name, **bounds)
    typer.echo(f"{name}: added to {path}. The key, which is shown only now:", err=True)
    print(secret)
    if not on:
        typer.echo(HOW.format(config=config, name=DEFAULT), err=True)


@app.command("remove")
def remove(name: Annotated[str, typer.Argument(help="The key's name.")], root: RootOption = None) -> None:
    """Take a key away; a running server refuses it within a second. What it has begun ends well."""
    from sun.router import key_file

    key_file.remove(_place(root)[0], name)
    print(f"{name}: removed.")


@app.command("list")
def list_keys(root: RootOption = None) -> None:
    """List the keys' names and bounds."""
    from rich.table import Table

    from sun.router import key_file
    from sun_client import show

    path, on, config = _place(root)
    table = Table("key", "requests/min", "tokens/min", "at once", "tasks", "priority at most")
    for key in key_file.read(path) if path.exists() else []:
        bounds = ["-" if bound is None else str(bound) for bound in (key.requests_per_minute, key.tokens_per_minute, key.max_inflight)]
        table.add_row(key.name, *bounds, "all" if key.tasks is None else ", ".join(key.tasks), key.priority_class)
    show.console.print(table)
    if not on:
        print(HOW.format(config=config, name=DEFAULT))


def _place(root: Path | None) -> tuple[Path, bool, Path]:
    """The file of keys, whether the server is configured to ask for them, and where that is configured."""
    from sun_build.config_file import parameter
    from sun_client.root import Root

    place = Root.find(root)
    name = parameter(place.models, "sun", "keys")
    return place.path / (name or DEFAULT), bool(name), place.models / "sun" / "config.pbtxt"
