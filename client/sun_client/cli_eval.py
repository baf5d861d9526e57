"""`sun eval`: how often a task is right, and what that is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sun_client import URL
from sun_client.cli_options import RootOption, UrlOption


def evaluate(
    task: Annotated[str, typer.Option(help="A task of the model repository.")],
    data: Annotated[Path, typer.Option(help='Test conversations, one JSON per line: {"messages": [...]}; the last assistant turn is the reference.')],
    metric: Annotated[str | None, typer.Option(help="exact, intent, bash, utility, flags, math or bfcl. Default: the task's.", show_default=False)] = None,
    against: Annotated[str, typer.Option(help="Rows of the table, with commas: base, full, naive, sun, qsun. With full, naive comes along.")] = "sun",
    full: Annotated[Path | None, typer.Option(help="A checkpoint of `sun tune --method full`, for the rows full and naive.", show_default=False)] = None,
    scheme: Annotated[str, typer.Option(help="Decode module of the row qsun: bf16, int8, int4, nf4, bnb-int8 or bnb-nf4.")] = "int4",
    prefill_scheme: Annotated[str, typer.Option(help="Of every row's prefill module: fp32, or int8 as its config.pbtxt may say.")] = "fp32",
    server: Annotated[bool, typer.Option("--server", help="Ask a running server in place of the engine: one row, of what it serves.")] = False,
    url: UrlOption = URL,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many.", show_default=False)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer. Default: 96, or the longest reference's.", show_default=False)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Answers decoded, or asked for, at once.")] = 32,
    out: Annotated[Path | None, typer.Option(
        help="Also write every example's answer to this JSONL file; with several rows, one file a row (NAME.ROW.jsonl).", show_default=False)] = None,
    root: RootOption = None,
) -> None:
    """Score a task on test data, greedily, with 95 % bootstrap intervals: with the engine that serves, or through a server."""
    from sun.router.tasks import TaskRegistry
    from sun_client import show
    from sun_client.root import Root

    place = Root.find(root)
    registry = TaskRegistry(place.models)
    if task not in registry.names():
        raise ValueError(f"--task: there is no task {task!r}; the tasks here are {', '.join(registry.names()) or 'none'}")
    metric = metric or registry.get(task).metric.get("name")
    if metric is None:
        raise ValueError(f"--metric: task {task} names none; give one")
    if not data.is_file():
        raise ValueError(f"--data: there is no file {data}")
    with show.quiet_libraries():
        from sun.model.quantise import FULL, check_scheme
        from sun_build import evaluate as engine
        from sun_build.contestants import contestant

        check_scheme(scheme)
        if server and prefill_scheme != FULL:
            raise ValueError("--prefill-scheme: a server has its own; leave it out with --server")
        names = rows(against, server)
        weights = place.models / f"prefill_{task}" / "1"
        tuned = None if registry.get(task).weights == "identity" else weights
        entrants = {} if server else {name: contestant(name, tuned, full, scheme) for name in names}
        conversations = engine.test_set(data, metric, limit)
        longest = engine.longest_reference(conversations, place.base)
        if max_tokens is not None and max_tokens < longest.tokens:
            print(f"{longest.where}: the reference is {longest.tokens} tokens with its end, and an answer is cut at {max_tokens} (--max-tokens): it cannot be right.")
        max_tokens = max_tokens or max(96, longest.tokens)
        for name in names:
            with show.counting(f"{task}: {name}", len(conversations)) as report:
                if server:
                    from sun_client.asking import server_answers

                    answers = server_answers(url, task, conversations, max_tokens, batch, report)
                else:
                    answers = engine.engine_answers(place.base, entrants[name], conversations, task, max_tokens, batch, report, prefill_scheme)
            scored = engine.score(conversations, answers, metric)
            result, row = engine.summary(scored), name if name != "qsun" else f"qsun ({scheme})"
            print(f"{task}: {row}: {metric} {result.score:.3f} [{result.ci_low:.3f}, {result.ci_high:.3f}] ({sum(s.right for s in scored)} of {result.n})", flush=True)
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                engine.write_scored(out if len(names) == 1 else out.with_suffix(f".{name}{out.suffix}"), scored)


def rows(against: str, server: bool) -> list[str]:
    """The rows that ``against`` names, naive after full if it is not named; ["server"] for a server. Raises ValueError for one that is not known."""
    from sun_build.contestants import ROWS

    names = list(dict.fromkeys(name.strip() for name in against.split(",") if name.strip()))
    if not names or any(name not in ROWS for name in names):
        raise ValueError(f"--against: got {against!r}, expected some of {', '.join(ROWS)}")
    if server:
        if names != ["sun"]:
            raise ValueError("--against: a server has one row, of what it serves; leave it out with --server")
        return ["server"]
    if "full" in names and "naive" not in names:
        names.insert(names.index("full") + 1, "naive")
    return names
