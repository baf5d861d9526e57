"""`sun quantize`: which number format the decode workers run, what it loses and what it gains."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from sun_client.cli_options import RootOption

AUTO = "auto"
ROUNDS = 7


def quantize(
    scheme: Annotated[str, typer.Option(help="fp32, bf16, int8, int4, nf4, bnb-int8, bnb-nf4, or auto: the fastest here at --batch.")] = AUTO,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Sequences that a worker usually decodes at once.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a worker.")] = 1,
    text: Annotated[Path | None, typer.Option(help="A text file of your kind of traffic to measure the loss on. Default: a page that comes along.", show_default=False)] = None,
    report: Annotated[Path | None, typer.Option(help="Write the loss, layer by layer, to this JSON file.", show_default=False)] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Set it in the config.pbtxt of every decode worker; the server takes it at its next start, or with `sun decode replace`.")] = False,
    root: RootOption = None,
) -> None:
    """Measure a low-bit decode module (QSUN): step times, agreement with float32, error by layer; --apply makes workers run it."""
    from sun.decode.packed import why_not
    from sun.model.calibration import TEXT
    from sun.model.quantise import FULL, SCHEMES, check_scheme
    from sun.readable import readable_json
    from sun_build import quantisation
    from sun_build.config_file import set_parameter
    from sun_client import show
    from sun_client.root import Root
    from sun_perf import steps

    place = Root.find(root)
    place.manifest()
    ids = quantisation.ids_of(place.base, TEXT if text is None else text.read_text())
    if scheme != AUTO and (why := why_not(check_scheme(scheme))):
        raise ValueError(f"--scheme: {scheme} does not run here: {why}")
    with show.working("timing decode steps"):
        left_out = {name: why for name in SCHEMES if (why := why_not(name))}
        here = [name for name in (FULL, *SCHEMES) if name not in left_out]
        taken = steps.measure(steps.steppers(place.base, here, threads, (batch,)), (batch,), ROUNDS)
        times = {name: median(kept) for (name, _), kept in taken.items()}
    for name, ms in times.items():
        print(f"{name:8} {ms:7.1f} ms a step of {batch}, {times[FULL] / ms:4.2f} x fp32")
    for name, why in left_out.items():
        print(f"{name:8} left out: {why}")
    chosen = min(times, key=times.get) if scheme == AUTO else scheme
    print(f"{chosen}: {'the fastest at this batch' if scheme == AUTO else 'as asked for'}.")
    with show.working("measuring the loss"):
        lost = quantisation.loss(place.base, chosen, ids)
    print(f"Against fp32 on {lost.tokens} tokens: the same next token for {lost.top1:.1%}, KL {lost.kl:.4f}, "
          f"perplexity {lost.perplexity:.2f} (fp32 {lost.full_perplexity:.2f}).")
    worst = sorted(lost.layers.items(), key=lambda item: -item[1])[:3]
    print("Largest errors: " + ", ".join(f"{name} {error:.1%}" for name, error in worst) + ".")
    if report is not None:
        report.write_bytes(readable_json(lost.as_dict()))
    if apply:
        for config in sorted(place.models.glob("decode_*/config.pbtxt")):
            set_parameter(config, "scheme", chosen)
            print(f"{config}: scheme {chosen}")
