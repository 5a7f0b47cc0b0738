"""``--tune``: as many tries for each model, judged by the validation set alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from recbole_sdpo.errors import UserError
from recbole_sdpo.experiment.file import Entry, Experiment, Settings, with_settings
from recbole_sdpo.experiment.plan import Run, grid, plan
from recbole_sdpo.experiment.runner import Failure, Runner
from recbole_sdpo.files import write_text
from recbole_sdpo.output import say
from recbole_sdpo.report.table import markdown_table
from recbole_sdpo.result import read_result
from recbole_sdpo.values import shown

FILE, DISCOUNT = "tuned.yaml", "popularity_discount"


def tune(experiment: Experiment, runner: Runner, folder: Path) -> tuple[Experiment, list[Failure]]:
    """Try ``experiment.tries`` settings of every entry that names some, with the first seed.

    The choice looks at the validation set alone, at the mean of ``valid_metric`` over all candidate
    sets, so that a row meant for the second of them is not tuned for the first; the chosen run is
    the table's own for that seed. Alignments are tried after the others, and begin from what did
    best for the row of their SFT. ``folder`` gets ``tuned.yaml``, with the settings that did best
    and all tries with their scores.

    Returns:
        the experiment with them in place, and the tries that failed.

    Raises:
        UserError: no entry has settings to try, one has too few of them, or all tries of one
            failed.
    """
    search = _Search.of(experiment, runner)
    aligned = [name for name in search.points if name in search.sft_row]
    search.run([name for name in search.points if name not in aligned])
    search.run(aligned)
    rows = [
        [name, score, json.dumps(point)]
        for name, tries in search.tries.items()
        for score, point in tries
    ]
    say(markdown_table(["tried", "validation", "settings"], rows))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, yaml.safe_dump(search.record(), sort_keys=False))
    return replace(experiment, runs=search.chosen()), search.failures


class Try(NamedTuple):
    """Settings, and how well a run with them validated: more is better."""

    score: float
    settings: Settings


@dataclass
class _Search:
    """Tries in the making.

    Attributes:
        points: for each entry to tune, by its name, the settings to try.
        sft_row: for each entry that begins from an SFT, the entry to tune, if any, that is that.
        tries: those that have a result.
    """

    experiment: Experiment
    runner: Runner
    points: dict[str, list[Settings]]
    sft_row: dict[str, str | None]
    tries: dict[str, list[Try]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    @classmethod
    def of(cls, experiment: Experiment, runner: Runner) -> _Search:
        """Before any try, with all settings checked."""
        entries = experiment.entries()
        points = {entry.name: grid(entry, experiment.tries) for entry in entries if entry.tune}
        if not points:
            raise UserError(
                "--tune needs runs with a key tune, such as tune: {learning_rate: [0.001, 0.003]} "
                "with tries: 2; none has one."
            )
        sft_row = _sft_rows(experiment, points)
        _check_all(experiment, points, sft_row)
        return cls(experiment, runner, points, sft_row)

    def run(self, names: list[str]) -> None:
        """Try all points of these entries."""
        entries = [entry for entry in self.experiment.entries() if entry.name in names]
        points = [(entry, point) for entry in entries for point in self.points[entry.name]]
        if not points:
            return
        runs = _plan(self.experiment, [self._with(entry, point) for entry, point in points])
        self.failures += self.runner.run_all(runs)
        for (entry, point), run in zip(points, runs, strict=True):
            if self.runner.done(run):
                score = _score(self.runner.folder(run))
                self.tries.setdefault(entry.name, []).append(Try(score, point))
        for name in names:
            if name not in self.tries:
                raise self._failed(name)

    def chosen(self) -> list[Entry]:
        """The rows of the table, with what did best."""
        return [self._with(entry, self._best(entry.name)) for entry in self.experiment.entries()]

    def record(self) -> dict[str, Any]:
        """What ``tuned.yaml`` holds."""
        return {
            name: {
                "best": self._best(name),
                "tries": [{"valid": score, **settings} for score, settings in tries],
            }
            for name, tries in self.tries.items()
        }

    def _best(self, name: str | None) -> Settings:
        """The first of the best, or nothing for an entry that is not tuned."""
        if name not in self.tries:
            return {}
        return max(self.tries[name], key=lambda one: one.score).settings

    def _with(self, entry: Entry, point: Settings) -> Entry:
        of_sft = self._best(self.sft_row.get(entry.name))
        return _handed_on(self.experiment, entry, of_sft, point)

    def _failed(self, name: str) -> UserError:
        mine = (name, f"SFT of {name}")
        failure = next(failure for failure in self.failures if failure.run.name in mine)
        return UserError(f"all tries of run {name!r} failed: {failure.why} (see {failure.log})")


def _handed_on(experiment: Experiment, entry: Entry, of_sft: Settings, point: Settings) -> Entry:
    """``entry`` with the settings ``of_sft`` that it begins from, but for what is its own, under
    what it varies and those of a try."""
    handed_on = {key: value for key, value in of_sft.items() if key != DISCOUNT}
    varied = {entry.axis[1]: entry.axis[2]} if entry.axis else {}
    row = with_settings(entry, handed_on, experiment.settings)
    return with_settings(row, varied | point, experiment.settings)


def _plan(experiment: Experiment, entries: list[Entry]) -> list[Run]:
    return plan(experiment, experiment.seeds[:1], entries)


def _check_all(
    experiment: Experiment, points: dict[str, list[Settings]], sft_row: dict[str, str | None]
) -> None:
    """Find now what is wrong with any try, and with any row after any try of its SFT, and not when
    all others have trained."""
    tried = [
        (point, _handed_on(experiment, entry, of_sft, point))
        for entry in experiment.entries()
        for of_sft in points.get(sft_row.get(entry.name) or "", [{}])
        for point in points.get(entry.name, [{}])
        if of_sft or point
    ]
    runs = _plan(experiment, [row for _, row in tried])
    first: dict[tuple[str, str], Settings] = {}
    for (point, _), run in zip(tried, runs, strict=True):
        other = first.setdefault((run.name, run.identity), point)
        if other != point:
            raise UserError(
                f"tune of run {run.name!r}: {shown(point)} is the same run as {shown(other)}; tune "
                "settings that have an effect on it."
            )
        if int(run.settings.get("eval_step", 1)) < 1:
            raise UserError(
                f"run {run.name!r}: --tune looks at the validation set; set eval_step to 1 or more."
            )


def _sft_rows(experiment: Experiment, points: dict[str, list[Settings]]) -> dict[str, str | None]:
    # A discount is a row's own: whose SFT an alignment begins from is asked without it, and rows
    # that vary it alone are one here.
    untuned = [
        replace(with_settings(entry, {DISCOUNT: 0.0}, experiment.settings), axis=None)
        for entry in experiment.entries()
    ]
    runs = _plan(experiment, untuned)
    rows = {run.identity: run.name for run in reversed(runs) if run.name in points}
    return {run.name: rows.get(run.start.identity) for run in runs if run.start}


def _score(folder: Path) -> float:
    result = read_result(folder)
    metric = result["settings"]["valid_metric"].lower()
    last = list(result["stages"].values())[-1]
    valid = [of_mode["valid"] for of_mode in last["candidates"].values()]
    if None in valid:
        raise UserError(
            f"--tune looks at the validation set, and {folder} has no validation, "
            "as where nothing was trained."
        )
    score = fmean(metrics[metric] for metrics in valid)
    return score if result["settings"]["valid_metric_bigger"] else -score
