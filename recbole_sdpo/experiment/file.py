"""An experiment as a YAML file: which models, with which settings and seeds, on which
candidates."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import pandas as pd

import recbole_sdpo
from recbole_sdpo.checks.metrics import is_of_lists, metric_key
from recbole_sdpo.errors import UserError, meant
from recbole_sdpo.evaluator.answers import OF_ANSWERS
from recbole_sdpo.evaluator.ranks import metric_of_targets
from recbole_sdpo.report.comparison import Published
from recbole_sdpo.report.groups import GROUPINGS
from recbole_sdpo.settings import (
    FILE_MODE,
    MODE,
    MODEL,
    PARTS,
    WITHOUT_EFFECT,
    Role,
    having,
    merged_parts,
)
from recbole_sdpo.values import KINDS, check_values, is_a, read_yaml, shown

Settings = dict[str, Any]

LONGEST_NAME = 200
"""Letters of a name or a title."""

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
        pairs: of rows that are tested, the first against the second, beside the comparison with
            the best baseline.
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
    pairs: list[tuple[str, str]] = field(default_factory=list)
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
        _check_list(self.candidates, "candidates", modes, _is_mode)
        self._check_metrics()
        if self.groups:
            known = f"names of {', '.join(GROUPINGS)}"
            _check_list(self.groups, "groups", known, lambda name: name in list(GROUPINGS))
        if self.tries < 1:
            raise UserError(f"tries={self.tries} must be 1 or more.")
        _check_settings("settings", self.settings)
        for entry in self.runs:
            _check_settings(f"run {entry.name!r}", entry.settings)
        for entry in self.runs:
            _check_name("the name of run", entry.name)
            _check_values(entry)
            self._check_published(entry)
        self._check_rows()

    def _check_metrics(self) -> None:
        _check_list(
            self.metrics,
            "metrics",
            "names of metrics such as NDCG@5",
            lambda metric: isinstance(metric, str),
        )
        names = [*map(metric_key, self.metrics)]
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

    def _check_rows(self) -> None:
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
        if self.pairs:
            _check_list(self.pairs, "pairs", "pairs of two different names of runs", _is_pair)
        for key, named in (("baselines", self.baselines), ("pairs", chain(*self.pairs))):
            for name in named:
                if name not in names:
                    raise UserError(
                        f"{key} name {name!r}, which is no run; it must be one of "
                        f"{', '.join(map(repr, names))}."
                    )

    def _check_candidates(self, entry: Entry) -> None:
        own = over(self.settings, entry.settings).get("candidates_file")
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
        merged = over(merged, {whole: _put(over(below, merged), key, value)[whole]})
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


def over(settings: Settings, upper: Settings) -> Settings:
    """``upper`` over ``settings``; of a setting that has parts, those of both count."""
    return settings | upper | merged_parts(settings, upper)


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
    return base | content | {"settings": over(below, settings)}


def written(file: Path) -> str:
    """The text of an experiment's file, and below it that of its base, and so on."""
    text = file.read_text(encoding="utf-8").rstrip()
    base = read_yaml(file).get("base")
    return f"{text}\n\n# {file.parent / base}\n{written(file.parent / base)}" if base else text


def _check_keys(
    given: Any, kind: type, where: str, needed: set[str], without: Collection[str] = ()
) -> None:
    known = {key: of for key, of in get_type_hints(kind).items() if key not in without}
    if not isinstance(given, dict):
        raise UserError(
            f"{where} must be a mapping with the keys {', '.join(known)}, not {shown(given)}."
        )
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{where} has an unknown key {shown(key)}; {meant(key, known)}")
        wanted = get_origin(known[key]) or known[key]
        if not is_a(value, (int, float) if wanted is float else wanted):
            raise UserError(f"{where}: {key}={shown(value)} must be {KINDS[wanted]}.")
    for key in sorted(needed - set(given)):
        raise UserError(f"{where} lacks the key {key!r}.")


def _published(where: str, run: Mapping[str, Any]) -> list[Published]:
    values = run.get("published", [])
    for value in values:
        _check_keys(value, Published, f"published of {where}", {"metric", "value", "source"})
    return [Published(**value) for value in values]


def _check_values(entry: Entry) -> None:
    """What ``vary`` and ``tune`` name, and the values that they give."""
    if len(entry.vary) > 1:
        raise UserError(
            f"run {entry.name!r} varies {', '.join(entry.vary)}; one setting at a time can be "
            "varied."
        )
    for key in _overlapping(entry.tune, entry.vary):
        raise UserError(f"run {entry.name!r} varies {key} and tunes it; leave one of the two out.")
    for part, lists in (("vary", entry.vary), ("tune", entry.tune)):
        for key, values in lists.items():
            _check_list(values, f"{part}.{key} of run {entry.name!r}", "values")
            for value in values:
                _check_settings(f"{part} of run {entry.name!r}", {key: value})
            if entry.model == MODEL and key in WITHOUT_EFFECT:
                raise UserError(
                    f"{part} of run {entry.name!r}: {key} has no effect on {MODEL}; give another "
                    "setting."
                )


def _is_mode(mode: Any) -> bool:
    return isinstance(mode, str) and bool(re.fullmatch(f"{MODE}|{FILE_MODE}", mode))


def _is_seed(seed: Any) -> bool:
    return is_a(seed, int) and 0 <= seed < 2**32


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


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[0] != value[1]


def _check_list(
    values: Any, what: str, kind: str, fits: Callable[[Any], bool] = lambda value: True
) -> None:
    different = isinstance(values, list) and not any(
        value in values[:place] for place, value in enumerate(values)
    )
    if not values or not different or not all(map(fits, values)):
        raise UserError(f"{what}={shown(values)} must be a list of different {kind}.")
