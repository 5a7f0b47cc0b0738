"""What a user gives to RecBole, before its ``Config`` reads it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from recbole.evaluator.register import metric_types
from recbole.utils import EvaluatorType, ModelType

from recbole_sdpo.checks.metrics import check_metrics, is_of_lists, without_aliases
from recbole_sdpo.checks.recbole_rules import DATASET, FIELDS, RECBOLE, model_rule
from recbole_sdpo.errors import UserError
from recbole_sdpo.settings import MODEL, SETTINGS, Role, having, merged_parts
from recbole_sdpo.values import shown


def check_given(
    given: dict[str, Any], defaults: Mapping[str, Any] | None = None, model: str = MODEL
) -> None:
    """Check what the user gave to RecBole, before its ``Config`` stumbles over it or takes it as
    something else.

    Args:
        given: the user's settings, which are brought in place into the form that RecBole reads:
            lists for tuples, its own names of metrics.
        defaults: what is under them, of RecBole, the model and ours; without, settings are checked
            each alone.
        model: its name.

    Raises:
        UserError: a value is of another type or form than RecBole reads, or does not go with
            another.
    """
    defaults = defaults or {}
    for key, value in given.items():
        if key == "gpu_id" and isinstance(value, list):  # as a YAML file has several
            given[key] = value = tuple(value)
        elif isinstance(value, tuple) and key != "gpu_id":
            given[key] = value = list(value)
        if key in ("metrics", "valid_metric"):
            given[key] = value = without_aliases(key, value)
        if key in RECBOLE:
            if key == "metrics":
                check_metrics(value)
            RECBOLE[key].check(key, value)
        elif (
            key in defaults
            and key not in having(Role.EVERY_MODEL)
            and not (model == MODEL and key in SETTINGS)
        ):
            model_rule(key, defaults[key], model).check(key, value)
    for key in having(Role.PATH) & set(given):
        _check_path(key, given[key])
    if "device" in given:  # RecBole puts its own in place of it
        raise UserError(
            f"device={shown(given['device'])} must be left out; gpu_id says which GPU a run "
            "takes, '' that it takes none."
        )
    if given.get("log_wandb") and not importlib.util.find_spec("wandb"):
        raise UserError(
            "log_wandb=True needs the package wandb, which is not installed; pip install wandb, "
            "or leave it out."
        )
    if defaults:
        _check_together({**defaults, **given, **merged_parts(defaults, given)})


def _check_path(key: str, value: Any) -> None:
    """Refuse what no file system takes; all that look for such a file would stumble, each in its
    place."""
    if isinstance(value, str):
        path = os.fsencode(value)
        if len(path) > 4000 or max(map(len, path.split(os.sep.encode()))) > 255:
            raise UserError(
                f"{key}={shown(value)} must have names of 255 bytes at most, and 4,000 in all."
            )


def _check_together(values: Mapping[str, Any]) -> None:
    """Of settings that do not go together, those on which RecBole's ``Config`` would stumble."""
    metrics, args = values["metrics"], values["eval_args"]
    metrics = [metrics] if isinstance(metrics, str) else metrics
    kinds = {metric_types[metric.lower()] for metric in metrics}
    if len(kinds) > 1:
        raise UserError(
            f"metrics={metrics} must all be of a ranking, such as NDCG, or all of labels, such as "
            "AUC."
        )
    modes = args.get("mode", "full")
    modes = set(modes.values() if isinstance(modes, dict) else [modes])
    if kinds == {EvaluatorType.VALUE} and modes != {"labeled"}:
        raise UserError(
            f"metrics={metrics} and eval_args.mode={shown(args.get('mode'))}: the mode must be "
            "labeled, for metrics of labels."
        )
    if kinds == {EvaluatorType.RANKING} and "labeled" in modes:
        raise UserError(
            f"metrics={metrics} and eval_args.mode=labeled: the metrics must be of labels, such "
            "as AUC."
        )
    lists, more = [*filter(is_of_lists, metrics)], values.get("more_candidates")
    file = values.get("candidates_file")  # in place of the mode
    if lists and ("full" not in modes or file) and not (isinstance(more, list) and "full" in more):
        now = f"candidates_file={file!r}" if file else ", ".join(sorted(modes))
        ways = "" if file else "eval_args.mode=full, or "
        raise UserError(
            f"metrics={metrics}: {lists[0]} is of the lists that all users get, each from the "
            f"whole catalogue; set {ways}more_candidates=['full'] (now {now})."
        )
    if values["MODEL_TYPE"] == ModelType.SEQUENTIAL:
        if not values["repeatable"]:
            raise UserError(
                "repeatable=False must be true for a sequential model; candidates_exclude_history "
                "keeps met items out."
            )
        if args.get("order", "RO") != "TO":
            raise UserError(
                f"eval_args.order={args.get('order', 'RO')!r} must be 'TO' for a sequential model."
            )
    if values["normalize_field"] is not None and values["normalize_all"]:
        raise UserError(
            "normalize_field and normalize_all=True both say what to normalize; give one of them."
        )
    _check_fields(values)


def _check_fields(values: Mapping[str, Any]) -> None:
    """Columns that RecBole makes or knows by name must have names of their own."""
    columns = {key: values[key] for key in FIELDS}
    columns["ITEM_ID_FIELD with LIST_SUFFIX"] = values["ITEM_ID_FIELD"] + values["LIST_SUFFIX"]
    columns["ITEM_ID_FIELD with NEG_PREFIX"] = values["NEG_PREFIX"] + values["ITEM_ID_FIELD"]
    keys: dict[str, str] = {}
    for key, column in columns.items():
        other = keys.setdefault(column, key)
        if other != key and {key, other} != {"RATING_FIELD", "LABEL_FIELD"}:
            raise UserError(f"{other} and {key} are both {column!r}; they must differ.")


def check_dataset(dataset: Any) -> None:
    """Refuse a name that leads elsewhere, before RecBole makes paths of it.

    Raises:
        UserError: it is not the name of a folder.
    """
    DATASET.check("dataset", dataset)
