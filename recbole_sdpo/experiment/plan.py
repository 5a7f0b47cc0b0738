"""The runs of an experiment: each row with each seed, and the SFT that it begins from."""

from __future__ import annotations

import copy
import itertools
import logging
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_sdpo import compat
from recbole_sdpo.checks.machine import check_folders
from recbole_sdpo.checks.metrics import is_of_lists
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.prompts import Templates
from recbole_sdpo.data.tables import read_table
from recbole_sdpo.device import check_device
from recbole_sdpo.errors import UserError
from recbole_sdpo.evaluator.answers import OF_ANSWERS
from recbole_sdpo.experiment.file import Entry, Experiment, Settings, over
from recbole_sdpo.experiment.identity import identity
from recbole_sdpo.inputs import Inputs
from recbole_sdpo.registry import default_settings
from recbole_sdpo.settings import (
    FILE_MODE,
    LEAVE_ONE_OUT,
    MODEL,
    Role,
    having,
)
from recbole_sdpo.values import several, shown


@dataclass(frozen=True)
class Run:
    """One training: an entry with a seed.

    Attributes:
        identity: equal for runs of which one result will do.
        settings: all that is not a default.
        start: the run whose SFT checkpoint it begins from, or None.
        inputs: what it reads, as that was when the experiment was planned.
    """

    name: str
    model: str
    dataset: str
    seed: int
    settings: Settings
    identity: str
    start: Run | None
    inputs: Inputs


def plan(
    experiment: Experiment, seeds: list[int] | None = None, entries: list[Entry] | None = None
) -> list[Run]:
    """All runs of an experiment, seed by seed; alignments of one SFT begin from the same run of it.

    Raises:
        UserError: a setting of one of them is wrong; the message names the run.
    """
    rows = experiment.entries() if entries is None else entries
    logging.disable(logging.WARNING)  # each run says again in its own log what it is warned of
    try:
        with compat.same_gpus():
            runs = [
                (entry, _run(experiment, entry, seed))
                for seed in seeds or experiment.seeds
                for entry in rows
            ]
    finally:
        logging.disable(logging.NOTSET)
    _check_axes(runs)
    return [run for _, run in runs]


def _check_axes(runs: list[tuple[Entry, Run]]) -> None:
    """Rows that differ in a setting alone must be different runs."""
    values: dict[tuple[str, str], Any] = {}
    for entry, run in runs:
        if entry.axis:
            name, key, value = entry.axis
            other = values.setdefault((name, run.identity), value)
            if other != value:
                raise UserError(
                    f"vary of run {name!r}: {key}={shown(value)} is the same run as "
                    f"{key}={shown(other)}; vary a setting that has an effect on it."
                )


def alike(runs: list[Run]) -> list[str]:
    """A sentence for rows that are one run."""
    rows: dict[str, dict[str, None]] = {}
    for run in runs:
        rows.setdefault(run.identity, {})[run.name] = None
    return [
        f"the rows {' and '.join(map(repr, names))} are one run: they differ in no setting that "
        "counts"
        for names in dict.fromkeys(tuple(names) for names in rows.values() if len(names) > 1)
    ]


def grid(entry: Entry, tries: int) -> list[Settings]:
    """The settings that ``--tune`` tries for ``entry``, ``tries`` of the product of its values,
    spread evenly: each time those values that were taken least::

        2 x 4 values, 4 tries      x . . x
                                   . x x .

    Raises:
        UserError: the product has fewer.
    """
    left = list(itertools.product(*(range(len(values)) for values in entry.tune.values())))
    if len(left) < tries:
        raise UserError(
            f"run {entry.name!r} gives {len(left)} settings to tune, and every model gets "
            f"tries={tries}; add values, or lower tries."
        )
    order = {place: number for number, place in enumerate(left)}
    taken: Counter[tuple[int, int]] = Counter()
    places: list[tuple[int, ...]] = []
    for number in range(tries):
        even = number * len(order) / tries
        _, _, place = min(
            (sum(taken[value] for value in enumerate(place)), abs(order[place] - even), place)
            for place in left
        )
        left.remove(place)
        places.append(place)
        taken.update(enumerate(place))
    return [
        {key: values[at] for (key, values), at in zip(entry.tune.items(), place, strict=True)}
        for place in sorted(places)
    ]


def _run(experiment: Experiment, entry: Entry, seed: int) -> Run:
    settings = over(experiment.settings, entry.settings)
    # A run knows the others' values by its ranks.
    asked = dict.fromkeys(
        metric.partition("@")[0]
        for metric in experiment.metrics
        if is_of_lists(metric) or (metric.lower() in OF_ANSWERS and entry.model == MODEL)
    )
    if asked:
        others = several(settings.get("metrics", default_settings(experiment.dataset)["metrics"]))
        if others:  # else the run refuses the setting
            settings["metrics"] = [*others, *(name for name in asked if name not in others)]
    if experiment.candidates[0] != FILE_MODE:
        mode = {"mode": experiment.candidates[0]}
        settings["eval_args"] = (settings.get("eval_args") or {}) | mode
    settings |= {"more_candidates": experiment.candidates[1:], "seed": seed, "show_progress": False}
    settings.setdefault("candidates_seed", experiment.seeds[0])
    try:
        run = _resolved(entry, experiment.dataset, settings)
        _check_metrics(experiment, settings)
        return run
    except UserError as error:
        raise UserError(f"run {entry.name!r}: {error}") from error


def _resolved(entry: Entry, dataset: str, settings: Settings) -> Run:
    config, start = RunConfig(entry.model, dataset, config_dict=copy.deepcopy(settings)), None
    check_device(config)
    check_folders(config)
    _check_targets(config)
    if entry.model == MODEL:
        own = config.settings
        Templates.load(own.prompt_templates).of_style(own.prompt_style)
    if entry.model == MODEL and not config.settings.sft_checkpoint:
        alone = _of_sft(settings, config.settings.prompt_style)
        if config.settings.reaches_alignment:
            # What suits the scores after alignment does not suit those before, and an SFT is chosen
            # by its scores as they are.
            start = _resolved(
                replace(entry, name=f"SFT of {entry.name}"),
                dataset,
                alone | {"popularity_discount": 0.0},
            )
        elif settings != alone:
            return _resolved(entry, dataset, alone)
    inputs = Inputs.of(config)
    name = identity(config, inputs, start.identity if start else None)
    return Run(entry.name, entry.model, dataset, settings["seed"], settings, name, start, inputs)


def _check_targets(config: RunConfig) -> None:
    """The table is of one target to a user, and of ranks that are known."""
    split = config["eval_args"]["split"]
    if split != LEAVE_ONE_OUT:
        raise UserError(
            f"eval_args.split={split!r}: users are compared by the rank of one target; it must be "
            f"{LEAVE_ONE_OUT}."
        )
    for part in (config["benchmark_filename"] or ())[2:]:
        file = Path(config["data_path"]) / f"{config['dataset']}.{part}.inter"
        if not file.is_file():
            continue  # which the run says
        table = read_table(file, config["field_separator"], config["encoding"])
        user = config["USER_ID_FIELD"]
        if user in table.types:
            table.refuse(
                pd.Series(table.text(user)).duplicated().to_numpy(),
                user,
                "has a row above; users are compared by the rank of one target, so each must have "
                "one row",
            )


def _check_metrics(experiment: Experiment, settings: Settings) -> None:
    """Of what all users get, the lists are as long as ``topk`` says; and of single targets, ranks
    are exact within the largest of these: beyond, equal scores share a rank, and
    ``full_sort=topk`` knows none."""
    lengths = several(settings.get("topk")) or default_settings(experiment.dataset)["topk"]
    for metric in filter(is_of_lists, experiment.metrics):
        if int(metric.partition("@")[2]) not in lengths:
            raise UserError(f"metric {metric!r} needs its cut-off in topk, which is {lengths}.")
    for metric in experiment.metrics:
        if int(metric.partition("@")[2] or 0) > max(lengths):
            raise UserError(
                f"metric {metric!r} needs ranks beyond the largest topk, which is {max(lengths)}; "
                "give a larger one."
            )


def _of_sft(settings: Settings, prompt_style: str) -> Settings:
    """``settings`` without those that count in the second stage alone."""
    of_negatives = {"train_neg_sample_args", "negative_sources"}
    in_text = of_negatives if prompt_style == "candidates" else set()
    second = having(Role.ALIGNMENT) - in_text
    return {key: settings[key] for key in settings if key not in second} | {"objective": "sft"}
