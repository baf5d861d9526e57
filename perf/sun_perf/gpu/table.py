"""A run's figures as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def table(made: dict) -> str:
    """Everything that `report` made."""
    return "\n".join(lines(made))


def lines(made: dict) -> Iterator[str]:
    """The parts that are there, in order."""
    machine, limits = made["machine"], next(iter(made.get("limits", [])), {})
    where = "Triton's interpreter on a CPU: its times mean nothing" if made["interpreted"] else machine["gpu"]
    yield f"\n{where}; torch {machine['torch']}, triton {made['triton']}; {made['config']}, random weights"
    if limits:
        yield f"memory: read {limits['read_gb_s']} GB/s, copied {limits['copy_gb_s']} GB/s (bytes read and written)"
    for check in made.get("checks", []):
        limit = "" if check["limit"] is None else f" (limit {check['limit']:.3g})"
        yield f"{'ok    ' if check['passed'] else 'FAILED'} {check['check']}: {check['error']}{limit}"
    rows = [row for name, part in made.items() if name.startswith("steps_") for row in part]
    if rows:
        yield f"\nA decode step, context {rows[0]['context']}"
        yield from columns(rows, ("scheme", "batch", "ms", "kernels_ms", "without_graphs_ms", "tokens_s", "floor_ms", "over_floor", "weights_gb"))
        yield from gains(rows)
    if systems := made.get("systems"):
        yield f"\n{systems[0]['sequences']} sequences of several tasks on one GPU"
        yield from columns(systems, ("system", "scheme", "tasks", "tpot_ms", "tokens_s", "measured", "weights_gb", "allocated_gb"))
    if rows := made.get("handoff"):
        yield "\nA prompt's KV, from the host into the pool"
        yield from columns(rows, ("tokens", "dtype", "mb", "pageable_ms", "pageable_us_per_token", "pageable_gb_s", "pinned_ms", "pinned_us_per_token", "pinned_gb_s"))
    if rows := made.get("handoff_ipc"):
        yield "\nA prompt's KV, from another process's memory on the GPU into the pool"
        yield from columns(rows, ("tokens", "mb", "open_ms", "copy_ms", "copy_gb_s", "checksum_ms", "verified_ms", "verified_us_per_token", "same"))
    if rows := made.get("prefill"):
        yield "\nA prompt's prefill, in one pass and in chunks"
        yield from columns(rows, ("scheme", "tokens", "ms", "tokens_s", "tflops", "chunk", "chunked_ms", "chunked_tokens_s"))
    if rows := [row for name, part in made.items() if name.startswith("tiles_") for row in part]:
        yield "\nLow-bit layers, cut in other ways"
        yield from columns(rows, ("scheme", "layer", "rows", "bf16_us", "default_us", "best_us", "best"))
    for name, reason in made["not_run"].items():
        yield f"not run: {name}: {reason}"
    for name, trace in made["failed"].items():
        yield f"FAILED {name}: {trace.strip().splitlines()[-1]}"
    yield f"seconds: {made['seconds']}"


def columns(rows: Sequence[dict], names: Sequence[str]) -> Iterator[str]:
    """Rows under their columns' names."""
    cells = [[str(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(names)]
    for row in (names, *cells):
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def gains(rows: Sequence[dict]) -> Iterator[str]:
    """How many times faster each scheme's step is than bf16's, by batch."""
    ms = {(row["scheme"], row["batch"]): row["ms"] for row in rows}
    batches = sorted({batch for _, batch in ms})
    for scheme in dict.fromkeys(scheme for scheme, _ in ms):
        if scheme != "bf16" and ("bf16", batches[0]) in ms:
            yield f"bf16 over {scheme}: " + "  ".join(f"{batch}: {ms['bf16', batch] / ms[scheme, batch]:.2f}x" for batch in batches)
