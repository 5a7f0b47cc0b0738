"""An experiment as a YAML file: which models, with which settings and seeds, on which
candidates."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

import recbole_sdpo
from recbole_sdpo import compat
from recbole_sdpo.checks.machine import check_folders
from recbole_sdpo.checks.metrics import is_of_lists, without_aliases
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.prompts import Templates
from recbole_sdpo.data.tables import read_table
from recbole_sdpo.device import check_device
from recbole_sdpo.errors import UserError, meant
from recbole_sdpo.evaluator.answers import OF_ANSWERS
from recbole_sdpo.evaluator.ranks import metric_of_targets
from recbole_sdpo.experiment.identity import identity
from recbole_sdpo.inputs import Inputs
from recbole_sdpo.registry import default_settings
from recbole_sdpo.report.comparison import Published
from recbole_sdpo.report.groups import GROUPINGS
from recbole_sdpo.settings import (
    FILE_MODE,
    LEAVE_ONE_OUT,
    MODE,
    MODEL,
    PARTS,
    WITHOUT_EFFECT,
    Role,
    having,
    merged_parts,
)
from recbole_sdpo.values import check_values, read_yaml, several, shown

Settings = dict[str, Any]

LONGEST_NAME = 200
"""Letters of a name or a title."""

KINDS: dict[str, tuple[Any, str]] = {
    "str": (str, "text"),
    "int": (int, "a whole number"),
    "float": (int | float, "a number"),
    "bool": (bool, "true or false"),
    "Settings": (dict, "a mapping"),
    "dict[str, list]": (dict, "a mapping"),
}
"""What a key of a file holds, by the type of its attribute, and in words; else a list."""

ENDS_A_LINE = {"Cc", "Cs", "Zl", "Zp"}
"""Categories of Unicode that no line of text holds."""


@dataclass(frozen=True)
class Entry:
    """A row of the table: a model with its settings.

    Attributes:
        name: in tables and figures.
        model: ``SDPO-LLM``, or any model of RecBole.
        settings: over those of the experiment.
        vary: a setting and its values; the entry then stands for one row a value, and a figure
            shows them all.
        tune: settings and the values that ``--tune`` tries.
        axis: of one row of such an entry: the entry's name, the setting and its value.
        published: values of others that the table shows beside ours; in the file a mapping with the
            keys of :class:`Published`, or a list of such.
    """

    name: str
    model: str = MODEL
    settings: Settings = field(default_factory=dict)
    vary: dict[str, list] = field(default_factory=dict)
    tune: dict[str, list] = field(default_factory=dict)
    axis: tuple[str, str, Any] | None = None
    published: list[Published] = field(default_factory=list)


@dataclass(frozen=True)
class Experiment:
    """What an experiment's YAML file holds; its keys are these names, and ``base``, a file beside
    it whose keys it changes.

    Attributes:
        title: over the report.
        dataset: its name.
        runs: the rows of the table, before ``vary`` is expanded.
        seeds: every row is run with each.
        candidates: evaluation modes; all models are stopped by the first, and chosen for each by
            its own validation. The first is ``file`` where the settings have ``candidates_file``.
        metrics: columns of the table; the first is the one that improvement is given in.
        baselines: names of the rows to compare with; by default those of other models than
            SDPO-LLM, or else the first row.
        groups: ways to group targets, in each of which the first metric is shown.
        cost: does the table show what a run costs?
        settings: of all runs.
        tries: how many settings ``--tune`` tries for each entry.
    """

    title: str
    dataset: str
    runs: list[Entry]
    seeds: list[int] = field(default_factory=lambda: [2020])
    candidates: list[str] = field(default_factory=lambda: ["uni19"])
    metrics: list[str] = field(default_factory=lambda: ["HR@1", "NDCG@5", "MRR@10"])
    baselines: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=lambda: ["met"])
    cost: bool = False
    settings: Settings = field(default_factory=dict)
    tries: int = 4

    @classmethod
    def load(cls, file: Path, overrides: Settings | None = None) -> Experiment:
        """Read and check an experiment; ``overrides`` are settings over those of every run.

        Raises:
            UserError: there is no such file, or a key, a name or a value in it is wrong.
        """
        content, overrides = _read(file), check_values(overrides or {})
        _check_keys(content, cls, str(file), {"dataset", "runs"})
        if not content["runs"]:
            raise UserError(f"{file} has no runs; give one or more, each with a name.")
        _check_trust(str(file), content)
        entries = []
        for number, run in enumerate(content["runs"]):
            if isinstance(run, dict) and isinstance(run.get("published"), dict):
                run = run | {"published": [run["published"]]}
            _check_keys(run, Entry, f"run {number + 1} of {file}", {"name"}, without={"axis"})
            _check_trust(f"run {number + 1} of {file}", run)
            run = run | {"published": _published(f"run {number + 1} of {file}", run)}
            entry = Entry(**run)
            refuse_overlap(overrides, entry.vary, f"run {entry.name!r} varies it")
            entries.append(with_settings(entry, overrides, content.get("settings", {})))
        parts: dict[str, Any] = {"title": file.stem} | content | {"runs": entries}
        experiment = cls(**parts)
        try:
            experiment._check()
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        return experiment

    def _check(self) -> None:
        _check_name("title", self.title)
        _check_list(self.seeds, "seeds", "whole numbers, 0 or more and below 2^32", _is_seed)
        modes = "modes such as full, uni19 or pop19, of which the first may be file"
        _check_list(
            self.candidates,
            "candidates",
            modes,
            lambda mode: isinstance(mode, str) and bool(re.fullmatch(f"{MODE}|{FILE_MODE}", mode)),
        )
        _check_list(
            self.metrics,
            "metrics",
            "names of metrics such as NDCG@5",
            lambda metric: isinstance(metric, str),
        )
        names = [without_aliases("valid_metric", metric).lower() for metric in self.metrics]
        for place, name in enumerate(names):
            if name in names[:place]:
                first = self.metrics[names.index(name)]
                raise UserError(f"metrics: {self.metrics[place]!r} is {first!r}; give it once.")
        for metric in self.metrics:
            if is_of_lists(metric):
                self._check_of_lists(metric)
                continue
            metric_of_targets(metric, pd.DataFrame({"rank": [1]}))
            if metric.lower() in OF_ANSWERS and not any(
                entry.model == MODEL for entry in self.runs
            ):
                raise UserError(
                    f"metric {metric!r} needs a run of {MODEL}, which alone writes answers; leave "
                    "it out."
                )
        if self.groups:
            known = f"names of {', '.join(GROUPINGS)}"
            _check_list(self.groups, "groups", known, lambda name: name in list(GROUPINGS))
        if self.tries < 1:
            raise UserError(f"tries={self.tries} must be 1 or more.")
        for where, settings in [
            ("settings", self.settings),
            *((f"run {entry.name!r}", entry.settings) for entry in self.runs),
        ]:
            _check_settings(where, settings)
        for entry in self.runs:
            _check_name("the name of run", entry.name)
            if len(entry.vary) > 1:
                raise UserError(
                    f"run {entry.name!r} varies {', '.join(entry.vary)}; one setting at a time "
                    "can be varied."
                )
            self._check_published(entry)
            for key in _overlapping(entry.tune, entry.vary):
                raise UserError(
                    f"run {entry.name!r} varies {key} and tunes it; leave one of the two out."
                )
            for part, lists in (("vary", entry.vary), ("tune", entry.tune)):
                for key, values in lists.items():
                    _check_list(values, f"{part}.{key} of run {entry.name!r}", "values")
                    for value in values:
                        _check_settings(f"{part} of run {entry.name!r}", {key: value})
                    if entry.model == MODEL and key in WITHOUT_EFFECT:
                        raise UserError(
                            f"{part} of run {entry.name!r}: {key} has no effect on {MODEL}; give "
                            "another setting."
                        )
        rows = self.entries()
        for row in rows:
            self._check_candidates(row)
            _check_name("the name of a varied run", row.name)
        names = [row.name for row in rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"runs must have different names, and {twice[0]!r} comes twice.")
        if self.baselines:
            _check_list(self.baselines, "baselines", "names of runs")
        for name in self.baselines:
            if name not in names:
                raise UserError(
                    f"baselines name {name!r}, which is no run; it must be one of "
                    f"{', '.join(names)}."
                )

    def _check_candidates(self, entry: Entry) -> None:
        own = _over(self.settings, entry.settings).get("candidates_file")
        for file in [own, *entry.tune.get("candidates_file", [])]:
            if [mode == FILE_MODE for mode in self.candidates] != [
                bool(file),
                *[False] * (len(self.candidates) - 1),
            ]:
                raise UserError(
                    f"candidates={self.candidates} with candidates_file={file!r} of run "
                    f"{entry.name!r}: the first must be {FILE_MODE!r} where all runs have that "
                    "setting, and none else."
                )

    def _check_of_lists(self, metric: str) -> None:
        if not re.fullmatch(r"\w+@[1-9][0-9]*", metric):
            raise UserError(f"metric {metric!r} must have a cut-off, such as {metric}@10.")
        if "full" not in self.candidates:
            raise UserError(
                f"metric {metric!r} is of the lists that all users get, each from the whole "
                f"catalogue; candidates={self.candidates} must have full among them."
            )
        if metric == self.metrics[0]:
            raise UserError(
                f"metrics={self.metrics} must begin with one of a target's rank, such as NDCG@5: "
                "it is the one that rows are compared by."
            )

    def _check_published(self, entry: Entry) -> None:
        where = f"published of run {entry.name!r}"
        if entry.published and entry.vary:
            raise UserError(f"{where} must be left out where a setting varies: of which is it?")
        for place, one in enumerate(entry.published):
            if one.metric not in self.metrics:
                raise UserError(
                    f"{where}: metric={shown(one.metric)} must be one of {', '.join(self.metrics)}."
                )
            if one.metric in [other.metric for other in entry.published[:place]]:
                raise UserError(f"{where} has {one.metric} twice; give it once.")
            of_lists = is_of_lists(one.metric)
            if of_lists and self.candidates[0] != "full":
                raise UserError(
                    f"{where}: metric={shown(one.metric)} is of the whole catalogue, and published "
                    f"values are of the first candidates; candidates={self.candidates} must begin "
                    "with full."
                )
            if not 0 <= one.value <= (math.inf if of_lists else 1):
                most = "more" if of_lists else "up to 1"
                raise UserError(f"{where}: value={shown(one.value)} must be a number, 0 or {most}.")
            _check_name(f"{where}: source", one.source)

    def entries(self) -> list[Entry]:
        """The rows of the table."""
        rows = []
        for entry in self.runs:
            for key, values in entry.vary.items():
                rows += [_with(entry, key, value, self.settings) for value in values]
            rows += [] if entry.vary else [entry]
        return rows

    def baseline_names(self) -> list[str]:
        """The rows that the others are compared with."""
        entries = self.entries()
        return (
            self.baselines
            or [entry.name for entry in entries if entry.model != MODEL]
            or [entries[0].name]
        )


@dataclass(frozen=True)
class Run:
    """One training: an entry with a seed.

    Attributes:
        identity: equal for runs of which one result will do.
        settings: all that is not a default.
        start: the run whose SFT checkpoint it begins from, or None.
    """

    name: str
    model: str
    dataset: str
    seed: int
    settings: Settings
    identity: str
    start: Run | None
    inputs: Inputs | None = None


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


def refuse_overlap(overrides: Settings, others: Collection[str], why: str) -> None:
    """Refuse an override of every run where a run has other values for it.

    Raises:
        UserError: naming it, and ``why``.
    """
    for key in _overlapping(overrides, others):
        raise UserError(
            f"{key}={shown(overrides[key])} is for every run, and {why}; leave one of the two out."
        )


def _overlapping(settings: Collection[str], others: Collection[str]) -> list[str]:
    """Those of ``settings`` that one of ``others`` is, or is a part of, or has as a part."""

    def is_part(key: str, whole: str) -> bool:
        return f"{key}.".startswith(f"{whole}.")

    return [
        key
        for key in settings
        if any(is_part(key, other) or is_part(other, key) for other in others)
    ]


def with_settings(entry: Entry, settings: Settings, below: Settings) -> Entry:
    """``entry`` with other settings over its own. A key with dots sets a part alone: the others are
    the entry's, or of the experiment's settings ``below`` it."""
    merged = entry.settings
    for key, value in settings.items():
        whole = str(key).partition(".")[0]
        merged = _over(merged, {whole: _put(_over(below, merged), key, value)[whole]})
    return replace(entry, settings=merged)


def _with(entry: Entry, key: str, value: Any, below: Settings) -> Entry:
    row = with_settings(entry, {key: value}, below)
    return replace(
        row,
        name=f"{entry.name}, {key.split('.')[-1]} = {value}",
        vary={},
        axis=(entry.name, key, value),
    )


def _put(settings: Settings, key: str, value: Any) -> Settings:
    """``settings`` with ``key``, of which dots lead into dictionaries, set to ``value``."""
    first, _, rest = str(key).partition(".")
    inner = settings.get(first) or {}
    if rest and not isinstance(inner, dict):
        raise UserError(f"{key!r} names a part of {first}={inner!r}, which has no parts.")
    return settings | {first: _put(inner, rest, value) if rest else value}


def _run(experiment: Experiment, entry: Entry, seed: int) -> Run:
    settings = _over(experiment.settings, entry.settings)
    # A run knows the others' values by its ranks.
    asked = [
        metric.partition("@")[0]
        for metric in experiment.metrics
        if is_of_lists(metric) or (metric.lower() in OF_ANSWERS and entry.model == MODEL)
    ]
    if asked:
        others = several(settings.get("metrics", default_settings(experiment.dataset)["metrics"]))
        if others:  # else the run refuses the setting
            settings["metrics"] = list(dict.fromkeys([*others, *asked]))
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


def _over(settings: Settings, upper: Settings) -> Settings:
    """``upper`` over ``settings``; of a setting that has parts, those of both count."""
    return settings | upper | merged_parts(settings, upper)


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


def _read(file: Path, depth: int = 0, asked_by: Path | None = None) -> Settings:
    """What a file holds, over what the file that it names as ``base`` holds; of ``settings``
    both count."""
    what = f"experiment={str(file)!r}" if asked_by is None else f"base={str(file)!r} of {asked_by}"
    if not file.exists():
        raise UserError(
            f"{what} does not exist; it must be a YAML file, such as those in "
            f"{Path(recbole_sdpo.__path__[0]) / 'configs'}."
        )
    content = read_yaml(file, what)
    if "base" not in content:
        return content
    name = content.pop("base")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{file}: base={shown(name)} must be the name of a file beside it.")
    if depth > 8:
        raise UserError(
            f"{file}: base={name!r} goes on for ever: files cannot be each other's base."
        )
    base, settings = _read(file.parent / name, depth + 1, file), content.get("settings", {})
    below = base.get("settings", {})
    for where, mapping in ((file.parent / name, below), (file, settings)):
        if not isinstance(mapping, dict):
            raise UserError(f"{where}: settings={shown(mapping)} must be a mapping.")
    return base | content | {"settings": _over(below, settings)}


def written(file: Path) -> str:
    """The text of an experiment's file, and below it that of its base, and so on."""
    text = file.read_text(encoding="utf-8").rstrip()
    base = read_yaml(file).get("base")
    return f"{text}\n\n# {file.parent / base}\n{written(file.parent / base)}" if base else text


def _check_keys(
    given: Any, kind: type, where: str, needed: set[str], without: Collection[str] = ()
) -> None:
    known = {f.name: str(f.type) for f in fields(kind) if f.name not in without}
    if not isinstance(given, dict):
        raise UserError(
            f"{where} must be a mapping with the keys {', '.join(known)}, not {shown(given)}."
        )
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{where} has an unknown key {shown(key)}; {meant(key, known)}")
        wanted, words = KINDS.get(known[key], (list, "a list"))
        if not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool):
            raise UserError(f"{where}: {key}={shown(value)} must be {words}.")
    for key in sorted(needed - set(given)):
        raise UserError(f"{where} lacks the key {key!r}.")


def _published(where: str, run: Mapping[str, Any]) -> list[Published]:
    values = run.get("published", [])
    for value in values:
        _check_keys(value, Published, f"published of {where}", {"metric", "value", "source"})
    return [Published(**value) for value in values]


def _is_seed(seed: Any) -> bool:
    return isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**32


def _check_name(what: str, name: str) -> None:
    if (
        not name.strip()
        or len(name) > LONGEST_NAME
        or any(unicodedata.category(c) in ENDS_A_LINE for c in name)
    ):
        raise UserError(
            f"{what} {shown(name)} must be a line of text, of {LONGEST_NAME} letters at most."
        )


def _check_settings(where: str, settings: Settings) -> None:
    for key, value in settings.items():
        if not isinstance(key, str):
            raise UserError(f"{where}: the key {shown(key)} must be text.")
        modes = key == "eval_args" and isinstance(value, dict) and "mode" in value
        if modes or key in having(Role.EXPERIMENT) | {"eval_args.mode"}:
            raise UserError(
                f"{where}: {key}={shown(value)} is the experiment's; give seeds and candidates at "
                "the top of its file."
            )
        if key in ("model", "dataset", "config_files"):
            raise UserError(
                f"{where}: {key}={shown(value)} is no setting; give the dataset at the top of the "
                "file, and each run its model."
            )
        if key in PARTS and not isinstance(value, dict):
            raise UserError(f"{where}: {key}={shown(value)} must be a mapping.")


def _check_trust(where: str, part: Mapping[str, Any]) -> None:
    """Whether code of others runs is for who calls to say, and for no file."""
    for key in ("settings", "vary", "tune"):
        if part.get(key, {}).get("trust_remote_code"):
            raise UserError(f"{where} must not set trust_remote_code; give it on the command line.")


def _check_list(
    values: Any, what: str, kind: str, fits: Callable[[Any], bool] = lambda value: True
) -> None:
    different = isinstance(values, list) and not any(
        value in values[:place] for place, value in enumerate(values)
    )
    if not values or not different or not all(map(fits, values)):
        raise UserError(f"{what}={shown(values)} must be a list of different {kind}.")
