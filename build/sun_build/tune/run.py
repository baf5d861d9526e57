"""A tuning run from settings and examples to a folder that `sun task add` takes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import set_seed

from sun.model.loading import task_digest
from sun.model.manifest import TASK_FILE, BaseManifest
from sun.model.weights import ADAPTER_FILES, weights_digest
from sun_build.tasks import weights_kind
from sun_build.tune.data import Example
from sun_build.tune.journal import CURVE_FILE, STEPS_FILE, Journal, Report, draw, read_steps
from sun_build.tune.modules import TwoModules
from sun_build.tune.settings import TuneSettings, devices
from sun_build.tune.shrink import shrink_adapter
from sun_build.tune.start import check_start
from sun_build.tune.stopping import DIVERGED, Finite, Interrupt, OptimizerGuard, out_of_memory
from sun_build.tune.trainer import CHECKPOINTS, TENSORBOARD, HandoffTrainer

SETTINGS_FILE = "tune.json"
SOURCES_FILE = "tune_sources.json"
STATE_FILE = "trainer_state.json"
"""What the trainer writes last into a checkpoint."""
WEIGHTS = (ADAPTER_FILES[1], "model.safetensors")
MADE = (*WEIGHTS, ADAPTER_FILES[0], "config.json", "generation_config.json", TASK_FILE, "README.md", STEPS_FILE, CURVE_FILE)
"""What a run leaves behind besides its settings. One by another method or adapter would leave part of it, to be served in place of its own."""


def is_main() -> bool:
    """Whether this process is the one that writes and speaks; with several devices there is one per device (torchrun says which)."""
    return os.environ.get("RANK", "0") == "0"


def read_settings(out: Path) -> TuneSettings:
    """Settings of the run in ``out``."""
    return TuneSettings(**json.loads((out / SETTINGS_FILE).read_text()))


def sources_of(base_dir: str | Path, rows: list[Example], held_out: list[Example], teacher: str | Path | None,
               start: Path | None = None) -> dict[str, str | None]:
    """What a run learns from, by digest: resumed on anything else it would be neither the old run nor a new one."""
    files = [] if teacher is None else sorted(path for path in Path(teacher).iterdir() if path.suffix in (".safetensors", ".bin"))
    return {"base": BaseManifest.load(base_dir).digest, "set of examples": _digest(rows), "set of held-out examples": _digest(held_out),
            "teacher": weights_digest(files) if files else None, "number of devices": str(devices()),
            "start": None if start is None else task_digest(start, weights_kind(start))}


def _digest(rows: list[Example]) -> str:
    digest = hashlib.sha256()
    for example in rows:
        digest.update(json.dumps([example.prompt, example.response]).encode())
    return f"sha256:{digest.hexdigest()}"


def begin(out: Path, settings: TuneSettings, sources: dict[str, str | None], resume: bool, overwrite: bool) -> Path | None:
    """Make ready ``out`` for a run; the checkpoint to go on from, if any.

    sources: see `sources_of`; a run is not held to what earlier versions did not write down. Raises ValueError if there is a run
    already and neither ``resume`` nor ``overwrite`` says what to do with it, if there is none to resume, or one that has ended or has other
    settings or sources, and if ``out`` holds what no run has left there.
    """
    said, learnt_from = out / SETTINGS_FILE, out / SOURCES_FILE
    if resume and overwrite:
        raise ValueError("resume: goes on with a run that overwrite takes away; give one of them")
    if not is_main():
        return _last_checkpoint(out) if resume else None
    if not said.is_file():
        if resume:
            raise ValueError(f"out: there is no run to resume in {out}")
        if found := [name for name in MADE if (out / name).exists()]:
            raise ValueError(f"out: {out} holds {found[0]}, which is not of a run of sun tune; a run needs a folder of its own")
    elif not overwrite:
        if not resume:
            raise ValueError(f"out: {out} holds a run already; resume it or overwrite it (--resume, --overwrite)")
        before = json.loads(learnt_from.read_text()) if learnt_from.is_file() else {}
        other = settings.differences(read_settings(out)) + [name for name, value in sources.items() if before.get(name, value) != value]
        if other:
            raise ValueError(f"out: the run in {out} has another {', '.join(other)}; give it the same to resume it")
        if _last_checkpoint(out) is None and any((out / name).is_file() for name in WEIGHTS):
            raise ValueError(f"out: the run in {out} has ended; --overwrite starts anew")
    else:
        for folder in (CHECKPOINTS, TENSORBOARD):
            shutil.rmtree(out / folder, ignore_errors=True)
        for name in MADE:
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    said.write_text(json.dumps(asdict(settings), indent=1) + "\n")
    learnt_from.write_text(json.dumps(sources, indent=1) + "\n")
    return _last_checkpoint(out)


def _last_checkpoint(out: Path) -> Path | None:
    """The last checkpoint that is whole: one that a kill or a full disk cut short is passed over."""
    def step(folder: Path) -> int:
        return int(folder.name.rpartition("-")[2])

    return next((folder for folder in sorted((out / CHECKPOINTS).glob("checkpoint-*"), key=step, reverse=True) if _whole(folder)), None)


def _whole(checkpoint: Path) -> bool:
    try:
        TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    except (OSError, ValueError, TypeError):
        return False
    return True


def tune(base_dir: Path, rows: list[Example], held_out: list[Example], out: Path, settings: TuneSettings, teacher: Path | None = None,
         start: Path | None = None, resume: bool = False, overwrite: bool = False, tensorboard: bool = False,
         report: Report = lambda step, loss, rate: None) -> dict | None:
    """Train, and write to ``out`` the weights, `tune.json` (the settings), `tune_sources.json`, `steps.jsonl` and `loss.png`.

    teacher: a checkpoint to distil from, needed if settings.distill is not 0. start: a folder of weights to begin with, see `check_start`. Returns what the task's card should say: the
    settings, with the steps that were taken, the last losses and the best held-out loss; None if the run was interrupted, which leaves a checkpoint to resume.
    Raises RuntimeError, with a checkpoint left too, if memory ran out, and if training diverged.
    """
    if settings.patience and not held_out:
        raise ValueError("patience: waits for a lower held-out loss; hold some examples out (--held-out)")
    if bool(settings.distill) != (teacher is not None):
        raise ValueError("distill: needs a teacher, and a teacher needs distill above 0")
    out = Path(out)
    if out.resolve() in (Path(folder).resolve() for folder in (base_dir, teacher, start) if folder is not None):
        raise ValueError(f"out: {out} holds the base or the teacher, or the weights to start from; a run needs a folder of its own")
    if start is not None:
        check_start(base_dir, start, settings)
    size = devices() * settings.batch * settings.accumulate
    if devices() > 1 and len(rows) < size:
        raise ValueError(f"data: {len(rows)} examples, and a step on {devices()} devices takes {size} (devices x batch x accumulate); "
                         "take fewer devices or a smaller --batch or --accumulate")
    checkpoint = begin(out, settings, sources_of(base_dir, rows, held_out, teacher, start), resume, overwrite)
    set_seed(settings.seed)  # before the adapter's weights are drawn
    model = TwoModules.load(base_dir, settings, teacher, start)
    interrupt, guard = Interrupt(), OptimizerGuard()
    journal = Journal(out, lambda: trainer.tokens, report)
    trainer = HandoffTrainer(model, rows, held_out, out, settings, tensorboard, [journal, interrupt, guard, Finite()])
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise RuntimeError(f"out of memory: {_rescue(trainer, guard)}; go on with --resume, and a smaller --batch with a larger "
                           f"--accumulate, or --checkpointing") from error
    finally:
        interrupt.release()
    if interrupt.stopped and trainer.state.global_step < settings.steps:
        return None
    if not all(p.isfinite().all() for p in model.learnt().values()):
        raise RuntimeError(f"the last step's weights are no numbers; {DIVERGED}")
    if is_main():
        model.export(out)
        if settings.export_rank is not None and (out / ADAPTER_FILES[0]).is_file():
            shrink_adapter(out, settings.export_rank)
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
        draw(out, f"{out.name}: {settings.method}, {settings.adapter}, decode {settings.decode}")
    lines = read_steps(out / STEPS_FILE)
    losses, held = [r["loss"] for r in lines if "loss" in r], [r["held_out_loss"] for r in lines if "held_out_loss" in r]
    return {
        **asdict(settings), "steps": trainer.state.global_step, "lr": settings.peak_lr, "examples": len(rows),
        "train_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4), "held_out_loss": round(min(held), 4) if held else None,
    }


def _rescue(trainer: HandoffTrainer, guard: OptimizerGuard) -> str:
    """Save where training stands, if weights and optimiser are of one step and no other device has to help; says what there is to resume from."""
    step = trainer.state.global_step
    if guard.whole and step and devices() == 1:
        trainer._save_checkpoint(trainer.model, trial=None)
        return f"step {step} is saved"
    saved = _last_checkpoint(Path(trainer.args.output_dir).parent)
    return "nothing was learnt yet" if saved is None else f"{saved.name.replace('checkpoint-', 'step ')} is saved"
