"""The command `sun`. Each group of commands has a file; what a command needs is imported when it runs, so that `sun --help` is quick."""

from __future__ import annotations

import gc
import os
import sys

import typer

from sun_client import (
    cli_ask, cli_build, cli_decode, cli_eval, cli_export, cli_gateway, cli_key, cli_plan, cli_quantize, cli_serve, cli_task, cli_tune, cli_watch,
)
from sun_client.errors import SunError

BESIDE, NICE = ("task", "decode"), 10
"""Commands that are given while a server's streams go on: where they want the same core, streams come first."""

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="SUN on Triton: many fine-tuned variants of one LLM share one frozen decode module.\n\n"
         "First: [bold]sun setup[/], then [bold]sun serve[/] in one terminal and "
         "[bold]sun ask --task bash \"find big files\"[/] in another. "
         "[bold]sun demo[/] shows it all at once. Your own task: [bold]sun tune[/], [bold]sun task add[/].")

app.command("setup", rich_help_panel="Prepare")(cli_build.setup)
app.command("base", rich_help_panel="Prepare")(cli_build.base)
app.command("data", rich_help_panel="Prepare")(cli_build.data)
app.command("tune", rich_help_panel="Tasks")(cli_tune.tune)
app.command("eval", rich_help_panel="Tasks")(cli_eval.evaluate)
app.add_typer(cli_task.app, name="task", rich_help_panel="Tasks")
app.add_typer(cli_key.app, name="key", rich_help_panel="Serve")
app.command("export", rich_help_panel="Serve")(cli_export.export)
app.command("quantize", rich_help_panel="Serve")(cli_quantize.quantize)
app.add_typer(cli_decode.app, name="decode", rich_help_panel="Serve")
app.command("plan", rich_help_panel="Serve")(cli_plan.plan)
app.command("serve", rich_help_panel="Serve")(cli_serve.serve)
app.command("gateway", rich_help_panel="Serve")(cli_gateway.gateway)
app.command("demo", rich_help_panel="Serve")(cli_serve.demo)
app.command("doctor", rich_help_panel="Serve")(cli_watch.doctor)
app.command("ask", rich_help_panel="Use")(cli_ask.ask)
app.command("stats", rich_help_panel="Use")(cli_ask.stats)
app.command("top", rich_help_panel="Use")(cli_watch.top)


def main() -> None:
    """Entry point. An error is one sentence on stderr and exit code 1; SUN_TRACEBACK=1 shows where it came from."""
    if sys.argv[1:2] and sys.argv[1] in BESIDE:
        os.nice(NICE)
    try:
        app()
    except (SunError, ValueError, OSError, RuntimeError) as error:
        if os.environ.get("SUN_TRACEBACK"):
            raise
        print(f"sun: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        gc.freeze()  # else Python looks through all of torch's objects for garbage at its end, see `sun.gently.go_gently`


if __name__ == "__main__":
    main()
