"""`sun ask` and `sun stats`: what needs only a running server."""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from sun_client import URL
from sun_client.cli_options import UrlOption
from sun_client.errors import SunError

if TYPE_CHECKING:
    from sun_client.client import Piece, SunClient
    from sun.messages import Stats


def ask(
    text: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    task: Annotated[str, typer.Option("--task", "-t", help="Which task's model is to answer (`sun task list` names them).")],
    url: UrlOption = URL,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens. Default: the task's", show_default=False)] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    timeout: Annotated[float | None, typer.Option(
        min=0.001, help="Seconds to wait for the whole answer. Default: the server's limit.", show_default=False)] = None,
    api_key: Annotated[str | None, typer.Option(
        envvar="SUN_API_KEY", help="For servers that ask for one; others of this machine see it unless the environment gives it.", show_default=False)] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Where the server has no room, wait as long as it says and ask once more.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead of streaming the text.")] = False,
) -> None:
    """Ask a running server and print the answer as it comes."""
    from sun_client.client import SunClient

    if text == "-":
        text = sys.stdin.read()
    sampling = {"temperature": temperature} | ({"max_tokens": max_tokens} if max_tokens is not None else {})
    answer, tokens, finish, started, first = "", [], None, time.perf_counter(), None
    request_id = uuid.uuid4().hex
    try:
        with SunClient(url, api_key) as client:
            for piece in _pieces(client, retry, task=task, text=text, sampling=sampling, timeout=timeout, request_id=request_id):
                first = first or time.perf_counter()
                answer, tokens, finish = answer + piece.text, tokens + piece.token_ids, piece.finish_reason
                if not as_json:
                    print(piece.text, end="", flush=True)
            last = time.perf_counter()
    except SunError as error:
        if answer and not as_json:
            print()
        raise _with_hint(error) from error
    if as_json:
        print(json.dumps({
            "request_id": request_id, "task": task, "text": answer, "finish_reason": finish, "num_input_tokens": piece.num_input_tokens,
            "num_output_tokens": len(tokens), "token_ids": tokens, "ttft_ms": round((first - started) * 1e3, 1),
            "tpot_ms": round((last - first) * 1e3 / (len(tokens) - 1), 1) if len(tokens) > 1 else None}, ensure_ascii=False))
    else:
        print()


def _pieces(client: SunClient, retry: bool, **asked: object) -> Iterator[Piece]:
    """An answer's pieces; with ``retry`` once more, if the server says when it will have room."""
    try:
        yield from client.stream(**asked)
    except SunError as error:
        if not retry or error.retry_after_s is None:
            raise
        print(f"sun: {error}", file=sys.stderr)
        time.sleep(error.retry_after_s)
        yield from client.stream(**asked)


def stats(url: UrlOption = URL) -> None:
    """Show what each decode worker of a running server is doing.

    load: tokens that its sequences may still generate. KV used: in tokens, of the worker's budget. ms/step: mean of the last 20 steps.
    module: number format and digest. last step: how many sequences of each task it held.
    """
    from rich.table import Column

    from sun_client import show
    from sun_client.client import SunClient
    from sun_client.top import numbers, table

    shown, broken = table("worker", Column("module", overflow="fold"), *numbers("running", "waiting", "load", "KV used", "steps", "ms/step"), "last step"), []
    try:
        with SunClient(url) as client:
            for worker in client.workers():
                try:
                    shown.add_row(worker, *_state(client.worker_stats(worker)))
                except SunError as error:
                    broken.append(f"{worker}: {error}")
    except SunError as error:
        raise _with_hint(error) from error
    show.console.print(shown)
    if broken:
        raise SunError("; ".join(broken))


def _state(state: Stats) -> tuple[str, ...]:
    """A worker's row."""
    recent = state.steps[-20:]
    return (
        state.shown_module + (", drains" if state.draining else ""),
        str(state.running), str(state.waiting), str(state.load.tokens), f"{state.budget_tokens - state.free_tokens}/{state.budget_tokens}",
        str(state.step), f"{sum(step.ms for step in recent) / len(recent):.1f}" if recent else "-",
        ", ".join(f"{task} {count}" for task, count in sorted(recent[-1].tasks.items())) if recent else "-")


def _with_hint(error: SunError) -> SunError:
    """The same error, with what to do where no server is there."""
    return SunError(f"{error}; start one with `sun serve`", error.code) if str(error).startswith("no server answers") else error
