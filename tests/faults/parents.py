"""The parent of an experiment is killed and begun again at once: its results are those of one
that was left alone."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import yaml

from tests.faults import oracle, toy
from tests.faults.judge import Wrong, ended_well, interrupted_well, last_line
from tests.faults.trial import Trial, command
from tests.faults.warm import Program

LONG, SHORT = 20, 1

SECONDS = 200
"""Its runs are processes that import everything anew."""


def attempt(trial: Trial) -> str:
    """Kill it, or interrupt it, at a random moment."""
    left, seconds = _alone(trial)
    number = trial.draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    moment = trial.draw.uniform(0.3 * seconds, seconds)
    trial.what = f"an experiment, {number.name} after {moment:.1f} s"
    program = _start(trial, trial.folder)
    if not program.ended(moment):
        program.send(number)
    ending = program.ending(SECONDS, alone=False)
    if ending.code == 0:
        ended_well(ending)
    elif number != signal.SIGKILL:
        interrupted_well(ending, number)
    again = _start(trial, trial.folder).ending(SECONDS)
    if again.code or not ended_well(again):
        raise Wrong("dead", last_line(again.err) or last_line(again.out))
    now = _remains(trial.folder)
    other = [run for run in left if left[run] != now.get(run)]
    if other or len(now) != len(left):
        raise Wrong(
            "wrong result",
            f"{len(now)} results in place of {len(left)}, {len(other)} of them others",
        )
    return "result"


def _start(trial: Trial, folder: Path) -> Program:
    settings = toy.settings("SDPO-LLM", data_path=str(trial.data), objective="sft")
    for key in ("eval_args", "show_progress"):  # an experiment's own
        del settings[key]
    runs = [{"name": "SFT"}]
    text = {
        "title": "t",
        "dataset": "toy",
        "candidates": ["uni5"],
        "metrics": ["HR@1"],
        "settings": settings,
        "runs": runs,
    }
    folder.mkdir(exist_ok=True)
    (folder / "try.yaml").write_text(yaml.safe_dump(text))
    return Program(folder, command, ["--experiment=try.yaml", "--output=report"])


def _alone(trial: Trial) -> tuple[dict[str, Any], float]:
    def make(folder: Path) -> None:
        began = time.monotonic()
        ending = _start(trial, folder).ending(SECONDS)
        if not ended_well(ending):
            raise Wrong(
                "dead", f"undisturbed, it ended with: {last_line(ending.err or ending.out)}"
            )
        (folder / "seconds").write_text(str(time.monotonic() - began))

    folder = trial.shared("experiment", make)
    return _remains(folder), float((folder / "seconds").read_text())


def _remains(folder: Path) -> dict[str, Any]:
    """What each run left, by its model and seed."""
    results = [file.parent for file in folder.rglob("result.json")]
    found = {}
    for run in results:
        result = oracle.result_of(run)
        found[f"{result['model']} {result['seed']}"] = oracle.remains(run)
    return found
