"""``--tune``: a small grid for each model, judged by the validation set alone, with as many tries for each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import yaml

from recbole_sdpo.errors import UserError
from recbole_sdpo.experiment.plan import Entry, Experiment, Settings, grid, plan, with_settings
from recbole_sdpo.experiment.runner import Failure, Runner
from recbole_sdpo.files import write_text
from recbole_sdpo.report.table import markdown_table
from recbole_sdpo.result import read_result

FILE, DISCOUNT = "tuned.yaml", "popularity_discount"


def tune(experiment: Experiment, runner: Runner, folder: Path) -> tuple[Experiment, list[Failure]]:
    """Try ``experiment.tries`` settings of every entry that names some, with the first seed.

    The choice looks at the validation set alone, at the mean of ``valid_metric`` over all candidate sets, so that a row meant for
    the second of them is not tuned for the first; the chosen run is the table's own for that seed. Alignments are tried after the
    others, and begin from what did best for the row of their SFT. ``folder`` gets ``tuned.yaml``, with the settings that did best and
    all tries with their scores.

    Returns:
        the experiment with them in place, and the tries that failed.

    Raises:
        UserError: no entry has settings to try, one has too few of them, or all tries of one failed.
    """
    tuned = [entry for entry in experiment.entries() if entry.tune]
    if not tuned:
        raise UserError("--tune needs runs with a key tune, such as tune: {learning_rate: [0.001, 0.003]}; none has one.")
    points = {entry.name: grid(entry, experiment.tries) for entry in tuned}
    first = experiment.seeds[:1]
    for run in plan(experiment, first, [with_settings(entry, point) for entry in tuned for point in points[entry.name]]):
        if int(run.settings.get("eval_step", 1)) < 1:  # found now, and not when all others have trained
            raise UserError(f"run {run.name!r}: --tune looks at the validation set; set eval_step to 1 or more.")
    # A discount is a row's own: whose SFT an alignment begins from is asked without it, and it is not handed on.
    untuned = plan(experiment, first, [with_settings(entry, {DISCOUNT: 0.0}) for entry in experiment.entries()])
    rows = {run.identity: run.name for run in reversed(untuned) if run.name in points}
    sft_row = {run.name: rows.get(run.start.identity) for run in untuned if run.start}
    found: dict[str, list[tuple[float, Settings]]] = {}
    best: dict[str | None, Settings] = {}
    failures: list[Failure] = []

    def with_tuned(entry: Entry, point: Settings) -> Entry:
        of_sft = best.get(sft_row.get(entry.name), {})
        return with_settings(entry, {key: value for key, value in of_sft.items() if key != DISCOUNT} | point)

    for aligned in (False, True):
        now = [entry for entry in tuned if (entry.name in sft_row) == aligned]
        tries = [(entry.name, point, with_tuned(entry, point)) for entry in now for point in points[entry.name]]
        runs = plan(experiment, first, [tried for *_, tried in tries])
        failures += runner.run_all(runs) if runs else []
        for entry in now:
            mine = [(point, run) for (name, point, _), run in zip(tries, runs) if name == entry.name and runner.done(run)]
            if not mine:
                why = next(failure for failure in failures if failure.run.name in (entry.name, f"SFT of {entry.name}"))
                raise UserError(f"all tries of run {entry.name!r} failed: {why.why} (see {why.log})")
            found[entry.name] = [(_score(runner.folder(run)), point) for point, run in mine]
            best[entry.name] = max(found[entry.name], key=lambda pair: pair[0])[1]  # the first of equals
    print(markdown_table(["tried", "validation", "settings"], [[n, s, json.dumps(p)] for n, pairs in found.items() for s, p in pairs]))
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: {"best": best[name], "tries": [{"valid": s, **p} for s, p in pairs]} for name, pairs in found.items()}
    write_text(folder / FILE, yaml.safe_dump(kept, sort_keys=False))
    chosen = [with_tuned(entry, best.get(entry.name, {})) for entry in experiment.entries()]
    return replace(experiment, runs=chosen), failures


def _score(folder: Path) -> float:
    result = read_result(folder)
    metric = result["settings"]["valid_metric"].lower()
    scores = [found["valid"] for found in list(result["stages"].values())[-1]["candidates"].values()]
    if None in scores:
        raise UserError(f"--tune looks at the validation set, and {folder} has no validation, as where nothing was trained.")
    score = fmean(valid[metric] for valid in scores)
    return score if result["settings"]["valid_metric_bigger"] else -score
