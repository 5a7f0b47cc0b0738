"""Two of everything at one moment: each ends as it does alone, or a sentence says why not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.faults import kills, oracle, toy
from tests.faults.judge import Wrong, ended_well
from tests.faults.trial import Trial

LONG, SHORT = 80, 4


def attempt(trial: Trial) -> str:
    """Two runs of some kind."""
    race = trial.draw.choice([one_model, one_model, two_models, one_folder, one_cache, one_resumed])
    trial.what = race.__doc__.split(",")[0]
    return race(trial)


def one_model(trial: Trial) -> str:
    """Two runs of one model and two seeds, in folders that are named by the time."""
    model = trial.draw.choice(["BPR", "BPR", "SASRec", "GRU4Rec", "SDPO-LLM", "Pop"])
    return _beside(trial, [(model, {"seed": 1}), (model, {"seed": 2})])


def two_models(trial: Trial) -> str:
    """Runs of two models, in folders that are named by the time."""
    models = trial.draw.sample(["BPR", "SASRec", "GRU4Rec", "SDPO-LLM", "Pop", "FPMC"], 2)
    return _beside(trial, [(model, {"seed": 1}) for model in models])


def one_cache(trial: Trial) -> str:
    """Two runs of one reference, whose cache they share."""
    settings = {"seed": 1, "fixed_negatives": True, "cache_dir": "cache"}
    return _beside(
        trial,
        [("SDPO-LLM", settings), ("SDPO-LLM", settings | {"beta": trial.draw.choice([1.0, 0.5])})],
    )


def one_folder(trial: Trial) -> str:
    """Two runs in one folder, of which one must be refused."""
    variant = trial.draw.choice(["scratch", "BPR", "SASRec", "more candidates"])
    left, _ = kills.alone(trial, variant)
    model, settings = kills.settings_of(trial, variant)
    trial.what += f": {variant}"
    return _both(trial, [(model, settings)] * 2, left)


def one_resumed(trial: Trial) -> str:
    """One interrupted run goes on twice, of which one must be refused."""
    variant = trial.draw.choice(["scratch", "lora"])
    left, seconds = kills.alone(trial, variant)
    model, settings = kills.settings_of(trial, variant)
    trial.what += f": {variant}"
    program = trial.start(settings, model=model)
    if not program.ended(0.7 * seconds):
        program.send(9)
    program.ending()
    if not (trial.folder / "run" / "state" / "state.json").is_file():
        return "result"  # there is nothing to go on from, or it was done
    settings["resume"] = settings.pop("run_dir")
    return _both(trial, [(model, settings)] * 2, left)


def _both(trial: Trial, runs: list[tuple[str, dict[str, Any]]], left: dict[str, Any]) -> str:
    """Both run in ``run``; one or both end well, and what they leave is what one leaves alone."""
    programs = []
    for model, settings in runs:
        programs.append(trial.start(settings, model=model))
        time.sleep(trial.draw.choice([0, 0, 0.01, 0.1]))
    well = [ended_well(program.ending(), ["run"]) for program in programs]
    if not any(well):
        raise Wrong("dead", "both were refused")
    oracle.check_alike(trial.folder / "run", left)
    return "result" if all(well) else "sentence"


def _beside(trial: Trial, runs: list[tuple[str, dict[str, Any]]]) -> str:
    """All end as they do alone."""
    programs, lone = [], []
    trial.what += f": {' and '.join(model for model, _ in runs)}"
    for model, other in runs:
        settings = toy.settings(model, data_path=str(trial.data), **other)
        name = f"lone-{model}-{'-'.join(f'{key}={value}' for key, value in sorted(other.items()))}"

        def make(folder: Path, model: str = model, settings: dict[str, Any] = settings) -> None:
            if not ended_well(trial.run(settings | {"run_dir": "run"}, model=model, folder=folder)):
                raise Wrong("vague", f"{model} does not run alone")

        lone.append(
            (
                model,
                other.get("seed"),
                other.get("beta", 1.0),
                oracle.remains(trial.shared(name, make) / "run"),
            )
        )
    for model, other in runs:
        programs.append(
            trial.start(toy.settings(model, data_path=str(trial.data), **other), model=model)
        )
        time.sleep(trial.draw.choice([0, 0, 0.01, 0.1]))
    for program in programs:
        if not ended_well(program.ending()):
            raise Wrong("dead", "one of two runs was refused, and they have nothing in common")
    folders = [file.parent for file in (trial.folder / "saved").rglob("result.json")]
    if len(folders) != len(runs):
        raise Wrong("wrong result", f"{len(folders)} results of {len(runs)} runs")
    for folder in folders:
        result = oracle.result_of(folder)
        mine = (result["model"], result["seed"], result["settings"].get("beta", 1.0))
        oracle.check_alike(folder, next(left for *which, left in lone if tuple(which) == mine))
    return "result"
