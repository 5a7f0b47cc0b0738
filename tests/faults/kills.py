"""A run is killed, at any moment, once or several times, and goes on to the same bits."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import oracle, toy
from tests.faults.judge import Wrong, ended_well, last_line
from tests.faults.trial import Trial
from tests.faults.warm import SECONDS, Program

LONG, SHORT = 300, 4

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "scratch": ("SDPO-LLM", {}),
    "lora": ("SDPO-LLM", {"backbone": "toy", "lora_rank": 2}),
    "more candidates": ("SDPO-LLM", {"more_candidates": ["pop5"]}),
    "fixed negatives": ("SDPO-LLM", {"fixed_negatives": True, "cache_dir": "cache"}),
    "worker": ("SDPO-LLM", {"worker": 1, "sft_epochs": 1, "sdpo_epochs": 1}),
    "candidates in the prompt": (
        "SDPO-LLM",
        {"prompt_style": "candidates", "prompt_candidates": 4, "sft_epochs": 1, "sdpo_epochs": 1},
    ),
    "dropout": (
        "SDPO-LLM",
        {"scratch_dropout": 0.2, "sft_gradient_accumulation": 2, "sdpo_max_train_targets": 20},
    ),
    "sft alone": ("SDPO-LLM", {"objective": "sft", "sft_epochs": 3}),
    "SASRec": ("SASRec", {"loss_type": "CE", "n_layers": 1, "hidden_size": 8, "inner_size": 8}),
    "BPR": ("BPR", {"more_candidates": ["pop5"]}),
}
"""Runs that differ in what they keep on the disk."""

DISTURBED = (-signal.SIGKILL, 9)
"""Exit codes of a run that was killed, or that ended at once as if it had been."""


def settings_of(trial: Trial, variant: str) -> tuple[str, dict[str, Any]]:
    """Model and settings of a variant, whose run folder is ``run`` in the working directory."""
    model, other = VARIANTS[variant]
    if "backbone" in other:
        other = other | {"backbone": str(trial.backbone)}
    return model, toy.settings(model, data_path=str(trial.data), run_dir="run", **other)


def alone(trial: Trial, variant: str) -> tuple[dict[str, Any], float]:
    """What an undisturbed run of the variant leaves, and how many seconds it takes."""
    model, settings = settings_of(trial, variant)

    def make(folder: Path) -> None:
        began = time.monotonic()
        ending = trial.run(settings, model=model, folder=folder)
        if not ended_well(ending):
            raise Wrong("dead", f"undisturbed, it ended with: {last_line(ending.err)}")
        (folder / "seconds").write_text(str(time.monotonic() - began))

    folder = trial.shared(f"alone-{variant}", make)
    return oracle.remains(folder / "run"), float((folder / "seconds").read_text())


def to_the_end(
    trial: Trial,
    variant: str,
    disturb: Callable[[Program], object],
    times: int,
    first: Callable[[], Callable[[], object]] = lambda: lambda: None,
) -> None:
    """Run a variant, ``disturb`` it and begin it again, so many times, and let it end.

    Args:
        first: makes what each of these programs calls before it begins.

    Raises:
        Wrong: it cannot go on, or ends as no undisturbed run does.
    """
    left, _ = alone(trial, variant)
    whole = True

    def disturbed(program: Program) -> bool:
        nonlocal times, whole
        if times:
            disturb(program)
        whole = not program.ended(SECONDS) or not times or program.code() not in DISTURBED
        times -= not whole
        return not whole

    while not (trial.folder / "run" / "result.json").is_file():
        go_on(trial, variant, disturbed, first)
    oracle.check_alike(trial.folder / "run", left)
    if whole:  # whoever is killed after the result was written had no time to clear up
        oracle.check_cleared(trial.folder / "run")


def go_on(
    trial: Trial,
    variant: str,
    disturbed: Callable[[Program], bool] = lambda program: False,
    first: Callable[[], Callable[[], object]] = lambda: lambda: None,
    run_dir: str = "run",
) -> None:
    """Begin a run, or begin it again: by ``--resume``, or from the start where that is refused.

    Args:
        disturbed: has this program been ended from outside? Then it is not asked how it ended.

    Raises:
        Wrong: it refuses both, or fails.
    """
    if (trial.folder / run_dir / "result.json").is_file():
        return
    model, settings = settings_of(trial, variant)
    said = []
    ways = (
        [{"resume": run_dir}] if model == "SDPO-LLM" and (trial.folder / run_dir).exists() else []
    )
    for how in (*ways, {"run_dir": run_dir}):
        again = {key: value for key, value in settings.items() if key != "run_dir"} | how
        program = trial.start(again, model=model, first=first())
        interrupted = disturbed(program)
        ending = program.ending()
        if interrupted or ended_well(ending):
            return
        said.append(last_line(ending.err))
    raise Wrong("dead", " | ".join(said))


def attempt(trial: Trial) -> None:
    """Kill at a random moment, up to three times."""
    variant = trial.draw.choice([*VARIANTS])
    _, seconds = alone(trial, variant)
    moments = [
        trial.draw.uniform(0, 1.05 * seconds) for _ in range(trial.draw.choice([1, 1, 2, 3]))
    ]
    trial.what = f"{variant}, killed after {', '.join(f'{moment:.3f} s' for moment in moments)}"
    moment = iter(moments)

    def kill(program: Program) -> None:
        if not program.ended(next(moment, SECONDS)):
            program.send(signal.SIGKILL)

    to_the_end(trial, variant, kill, len(moments))
