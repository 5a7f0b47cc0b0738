"""What we ask of RecBole's settings, each alone (:data:`RECBOLE`), together, and with ours."""

from __future__ import annotations

import codecs
import importlib.util
import inspect
import os
import re
from collections.abc import Collection, Mapping
from functools import cache
from logging import getLogger
from pathlib import Path
from typing import Any

import recbole
import yaml
from recbole.config import Config
from recbole.evaluator.register import metric_types, metrics_dict
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import EvaluatorType, InputType, ModelType

from recbole_sdpo.compat import TEACHERS
from recbole_sdpo.data.columns import check_columns
from recbole_sdpo.data.negatives import SELF, shares
from recbole_sdpo.errors import UserError, meant
from recbole_sdpo.files import user_path
from recbole_sdpo.objectives import OBJECTIVES, Constants
from recbole_sdpo.rules import ANY, FLAG, Parts, Rule, dict_of, list_of, number, one_of, text, whole
from recbole_sdpo.settings import (
    FILE_MODE,
    LEAVE_ONE_OUT,
    MODE,
    MODEL,
    NO_FULL_RANKING,
    RECBOLE_KEYS,
    WITHOUT_EFFECT,
    Role,
    Settings,
    having,
    merged_parts,
    names,
)
from recbole_sdpo.values import Loader, read_yaml, shown

PROPERTIES = Path(recbole.__path__[0], "properties")

DATASET = text(
    "a name without '/' and '\\', of at most 100 characters",
    r"(?!\.{1,2}$)(?=.*\S)[^/\\\x00-\x1f\x7f]{1,100}",
    "toy",
)
MODEL_NAME = text("a name of letters, digits, '-' and '_'", r"[A-Za-z0-9_-]{1,100}", MODEL, "BPR")

_FIELD = text(
    "the name of a column, without ':' and without blanks at its ends",
    r"(?!\s)[^:\x00-\x1f\x7f]{1,100}(?<!\s)",
    "rating",
)
_FIELDS = list_of(_FIELD, "a list of names of columns")
_SUFFIX = text(
    "the suffix of a file, such as inter", r"(?!\.)[^/\\\s\x00-\x1f]{1,50}", "inter", "item"
)
_NUM = r"\s*[-+]?(\d+\.?\d*([eE][-+]?\d+)?|\.\d+|inf)\s*"


def _is_interval(value: Any) -> bool:
    """Is it as RecBole parses it, ``[4,inf)`` or several with ``;`` between, none of them empty?"""
    for part in value.split(";") if isinstance(value, str) and len(value) <= 1000 else [""]:
        ends = re.fullmatch(rf"\s*[\[(]({_NUM}),({_NUM})[\])]\s*", part)
        if not ends or float(ends[1]) > float(ends[4]):
            return False
    return True


_INTERVAL = Rule(
    "an interval such as '[4,inf)', or several with ';' between",
    _is_interval,
    ("[0,inf)", "[2,inf)", "(1,5];[7,9)"),
)
_TOKENS = list_of(text("a token", r"(?s).+", "1"), "a list of tokens, each as text", 1)
_ALIAS = list_of(_FIELD, "a list of names of columns", 1).or_null()


def _is_encoding(value: Any) -> bool:
    try:
        return (
            isinstance(value, str)
            and codecs.lookup(value)._is_text_encoding
            and b"a".decode(value, "replace") is not None
        )
    except (LookupError, ValueError):
        return False


def _is_split(split: Any) -> bool:
    """Are there to be parts for training, validation and test?"""
    kind, shares = (
        next(iter(split.items())) if isinstance(split, dict) and len(split) == 1 else (None, None)
    )
    parts = list_of(number(0, 1e6, above=True), "three shares", 3, 3)
    return split == LEAVE_ONE_OUT or (kind in ("RS", "TS") and parts.holds(shares))


_SPLIT = Rule(
    f"{LEAVE_ONE_OUT}, or {{'RS': [0.8, 0.1, 0.1]}} or TS with three shares above 0",
    _is_split,
    (LEAVE_ONE_OUT, {"RS": [0.8, 0.1, 0.1]}, {"TS": [0.8, 0.1, 0.1]}),
)
_ONE_MODE = text(
    "full, labeled, or uniN or popN for N sampled items, such as uni19",
    rf"labeled|(?=.{{1,9}}$)({MODE})",
    *("full", "uni5", "pop5", "labeled"),
)
_MODE = _ONE_MODE.or_else(
    dict_of(one_of("valid", "test"), _ONE_MODE, "a dictionary of these for valid and test", 1)
)

_GPU = r"(\d{1,4}|(GPU|MIG)-[\w/-]+)"


def _is_gpu(value: Any) -> bool:
    """Does RecBole make the numbers of GPUs of it, by which CUDA is told which to show?"""
    if isinstance(value, str):
        return re.fullmatch(rf"|-1|{_GPU}(\s*,\s*{_GPU})*", value) is not None
    return all(map(whole(-1, 1023).holds, value if isinstance(value, tuple) else [value]))


_METRIC = Rule(
    "the name of a metric",
    lambda value: isinstance(value, str) and value.lower() in metrics_dict,
    ("NDCG", "Hit", "MRR", "AUC", "GAUC"),
)
_K = whole(1, 10**6)
_NORM = Rule(
    "a number above 0, or 'inf'",
    lambda value: value == "inf" or number(0, above=True).holds(value),
    (2.0, "inf"),
)

_DECLARED: dict[str, Rule | Parts] = {
    # Environment
    "gpu_id": Rule(
        "a number such as 0, numbers such as '0,1', or '' for no GPU", _is_gpu, (0, "0", "", "0,1")
    ),
    "worker": whole(0, 256),
    "seed": whole(0, 2**32 - 1),
    "state": one_of("debug", "info", "warning", "error", "critical", any_case=True),
    "dataset_save_path": text().or_null(),
    "dataloaders_save_path": text().or_null(),
    "encoding": Rule(
        "the name of a text encoding, such as utf-8, or null",
        lambda value: value is None or _is_encoding(value),
        ("utf-8",),
    ),
    # Training
    "epochs": whole(0),
    "train_batch_size": whole(1),
    # no model of RecBole's has gradients for sparse_adam
    "learner": one_of("adam", "adamw", "sgd", "adagrad", "rmsprop", any_case=True),
    "learning_rate": number(0, 1000, above=True),
    "train_neg_sample_args": Parts(
        {
            "distribution": one_of("uniform", "popularity").or_null(),
            "sample_num": whole(0, 10_000),
            "alpha": number(0, 20),  # RecBole's powers of small shares must not vanish
            "dynamic": FLAG,
            "candidate_num": whole(0, 10_000),
        },
        null=True,
    ),
    "eval_step": whole(-1),
    "clip_grad_norm": Parts(
        {
            "max_norm": number(0, above=True),
            "norm_type": _NORM,
            "error_if_nonfinite": FLAG,
            "foreach": FLAG.or_null(),
        },
        frozenset({"max_norm"}),
        null=True,
    ),
    "loss_decimal_place": whole(0, 32),
    "transform": one_of(
        "mask_itemseq", "inverse_itemseq", "crop_itemseq", "reorder_itemseq"
    ).or_null(),
    "mask_ratio": number(0, 1),
    "ft_ratio": number(0, 1),
    "eta": number(0, 1),
    # Evaluation
    "eval_args": Parts(
        {
            "split": _SPLIT,
            "order": one_of("RO", "TO"),
            "group_by": one_of("user", "none").or_null(),
            "mode": _MODE,
        }
    ),
    "metrics": list_of(_METRIC, "a list of metrics, such as ['Hit', 'NDCG']", 1, 100).or_else(
        _METRIC
    ),
    "topk": _K.or_else(list_of(_K, "a list of them, such as [1, 5, 10]", 1, 1000)),
    "valid_metric": text(
        "the name of a metric, such as NDCG@5", r"\w+(@\d{1,9})?", "NDCG@5", "Hit@1"
    ),
    "eval_batch_size": whole(1),
    "metric_decimal_place": whole(0, 32),
    "tail_ratio": number(0).or_null(),
    # Data
    "field_separator": text(
        "one character that no name holds, such as a tab", r'[^\w:"\n\r]', "\t"
    ),
    "seq_separator": text(
        "one character or more between words, such as a blank", r"(?s).{1,20}", " "
    ),
    "seq_len": dict_of(
        _FIELD, whole(1, 10**6), "a dictionary of columns and lengths, such as {'class': 5}"
    ).or_null(),
    "threshold": dict_of(
        _FIELD, number(), "a dictionary of one column and a number, such as {'rating': 4}", 1, 1
    ).or_null(),
    "NEG_PREFIX": text(
        "what begins the name of a column, such as neg_", r"[^:\s\x00-\x1f]{1,50}", "neg_", "n"
    ),
    "LIST_SUFFIX": text(
        "what ends the name of a column, such as _list", r"[^:\s\x00-\x1f]{1,50}", "_list", "l"
    ),
    "numerical_features": _FIELDS,
    "load_col": dict_of(
        _SUFFIX,
        _FIELDS.or_else(one_of("*")),
        "a dictionary of files and columns, such as {'inter': ['user_id', 'item_id', 'timestamp']}",
        least=1,
    ).or_null(),
    "unload_col": dict_of(
        _SUFFIX, _FIELDS, "a dictionary of files and columns, such as {'item': ['price']}"
    ).or_null(),
    "unused_col": dict_of(
        _SUFFIX, _FIELDS, "a dictionary of files and columns, such as {'inter': ['rating']}"
    ).or_null(),
    "additional_feat_suffix": _SUFFIX.or_else(
        list_of(_SUFFIX, "a list of these", 0, 100)
    ).or_null(),
    "rm_dup_inter": one_of("first", "last").or_null(),
    "val_interval": dict_of(
        _FIELD,
        _INTERVAL.or_else(_TOKENS),
        "a dictionary of columns and intervals, such as {'rating': '[3,inf)'}, or lists of "
        "tokens, such as {'class': ['a', 'b']}",
    ).or_null(),
    **{
        f"{kind}_num_interval": _INTERVAL.or_null()
        for kind in ("user_inter", "item_inter", "entity_kg", "relation_kg")
    },
    **{f"alias_of_{kind}_id": _ALIAS for kind in ("user", "item", "entity", "relation")},
    "preload_weight": dict_of(
        _FIELD,
        _FIELD,
        "a dictionary of a column of tokens and one of numbers, such as {'id': 'vector'}",
    ).or_null(),
    "normalize_field": _FIELDS.or_null(),
    "normalize_all": FLAG.or_null(),
    "discretization": dict_of(
        _FIELD,
        Rule(
            "a method",
            lambda value: (
                isinstance(value, dict)
                and set(value) <= {"method", "bucket"}
                and (
                    value == {"method": "LD"}
                    or (value.get("method") == "ED" and whole(1, 10**6).holds(value.get("bucket")))
                )
            ),
            ({"method": "ED", "bucket": 5}, {"method": "LD"}),
        ),
        "a dictionary of columns and methods, such as {'price': {'method': 'ED', 'bucket': 10}} "
        "or {'price': {'method': 'LD'}}",
    ).or_null(),
    "MAX_ITEM_LIST_LENGTH": whole(1, 10_000),
    "benchmark_filename": list_of(
        _SUFFIX, "a list of three parts of file names, such as ['train', 'valid', 'test']", 3, 3
    ).or_null(),
    # Of models
    "embedding_size": whole(1, 10_000),
    "hidden_act": one_of("gelu", "relu", "swish", "tanh", "sigmoid"),
}

_REAL = {"resolution", "global_ratio", "spatial_ratio", "w_max", "q"}
"""Properties of models that are real numbers although their defaults are whole."""


def _by_type(key: str, default: Any) -> Rule:
    """Of a key of RecBole's properties/overall.yaml and properties/dataset/sample.yaml."""
    if isinstance(default, bool):
        return FLAG
    if isinstance(default, int):
        return whole(0)
    if isinstance(default, float):
        return number(0)
    return _FIELD if key.endswith("_FIELD") else text("text, and not blank", r"(?s).*\S.*", default)


def _recbole() -> dict[str, Rule | Parts]:
    defaults = read_yaml(PROPERTIES / "overall.yaml") | read_yaml(
        PROPERTIES / "dataset" / "sample.yaml"
    )
    return {
        key: _by_type(key, default) for key, default in defaults.items() if key not in _DECLARED
    } | _DECLARED


RECBOLE: dict[str, Rule | Parts] = _recbole()
"""For each key of RecBole's that is no property of one model, what its value must be."""

FIELDS = [key for key in RECBOLE if key.endswith("_FIELD")]


@cache
def properties() -> tuple[dict[str, dict[str, Any]], dict[tuple[str, str], set[str]]]:
    """Of RecBole's models: for each property, each model's default; for some and a model, the
    words that its comment lets choose from."""
    defaults: dict[str, dict[str, Any]] = {}
    words: dict[tuple[str, str], set[str]] = {}
    for file in sorted(PROPERTIES.glob("model/*.yaml")):
        content = file.read_text(encoding="utf-8")
        for key, default in (yaml.load(content, Loader) or {}).items():
            defaults.setdefault(key, {})[file.stem] = default
        for key, choices in re.findall(
            r"(?m)^([\w-]+):.*# \(str\).*[Rr]ang(?:e|ing) in \[(.*?)\]", content
        ):
            words[key, file.stem] = set(re.findall(r"\w+", choices))
    return defaults, words


def model_rule(key: str, default: Any, model: str) -> Rule:
    """What a property of one of RecBole's models must be: of the type of its default, and within
    reason."""
    known, words = properties()
    others = [
        other
        for other in known.get(key, {}).values()
        if isinstance(other, int | float) and not isinstance(other, bool)
    ]
    if isinstance(default, bool) and not others:
        return FLAG
    if isinstance(default, bool | int | float):
        least = min(0, 10 * min(others, default=0))
        if any(isinstance(other, float) for other in others) or key in _REAL:
            share = "drop" in key or "prob" in key
            rule = number(0, 1) if share else number(least)
            return rule.or_else(FLAG) if isinstance(default, bool) else rule
        sizes = (
            re.search("size|dim|head|rank|num|factor|len|memory|order|interest|^n[hv]$|^k", key)
            and min(others) > 0
        )
        return whole(1 if sizes else int(least), max(10_000, 100 * int(max(others))))
    if (key, model) == ("teacher", "KD_DAGFM"):
        return one_of(*TEACHERS)
    if isinstance(default, str):
        if choices := words.get((key, model)):
            return one_of(*sorted(choices | {default}))
        return text("text", r"(?s).*" if not default else r"(?s).*\S.*", default)
    if isinstance(default, list):
        numbers = all(isinstance(item, int | float) for item in default)
        item = (
            (number(0) if any(isinstance(item, float) for item in default) else whole(0, 10_000))
            if numbers
            else text("text")
        )
        weights = re.search("weights?$|probs$", key)
        least, most = (len(default), len(default)) if weights else (min(1, len(default)), 1000)
        words_of = (
            "a list of "
            f"{'numbers' if numbers else 'texts'}{f', {least} of them' if weights else ''}, such "
            f"as {default}"
        )
        return list_of(item, words_of, least, most)
    return (
        Rule("a dictionary", lambda value: isinstance(value, dict), (default,))
        if isinstance(default, dict)
        else ANY
    )


def check_given(
    given: dict[str, Any], defaults: Mapping[str, Any] | None = None, model: str = MODEL
) -> None:
    """Check what the user gave to RecBole, before its ``Config`` stumbles over it or takes it as
    something else.

    Args:
        given: the user's settings.
        defaults: what is under them, of RecBole, the model and ours; without, settings are checked
            each alone.
        model: its name.

    Raises:
        UserError: a value is of another type or form than RecBole reads, or does not go with
            another.
    """
    defaults = defaults or {}
    for key, value in given.items():
        if isinstance(value, tuple) and key != "gpu_id":
            given[key] = value = list(value)
        if key in ("metrics", "valid_metric"):
            given[key] = value = _without_aliases(key, value)
        if key in RECBOLE:
            if key == "metrics":
                _check_metrics(value)
            RECBOLE[key].check(key, value)
        elif (
            key in defaults
            and key not in having(Role.EVERY_MODEL)
            and not (model == MODEL and key in names())
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


ALIASES = {"hr": "Hit", "hitrate": "Hit", "hitratio": "Hit"}
"""Other names of RecBole's metrics, in lower case."""


def _without_aliases(key: str, value: Any) -> Any:
    """``metrics`` and ``valid_metric`` by RecBole's names."""
    if isinstance(value, list):
        names = [_without_aliases(key, item) for item in value]
        return [name for place, name in enumerate(names) if name not in names[:place]]
    if not isinstance(value, str):
        return value
    name, at, k = value.partition("@")
    if key == "metrics" and at:  # no name, as the error will say
        return value
    return ALIASES.get(name.lower(), name) + at + k


def _check_metrics(metrics: Any) -> None:
    for metric in metrics if isinstance(metrics, list) else [metrics]:
        if isinstance(metric, str) and metric.lower() not in metrics_dict:
            known = [kind.__name__ for _, kind in sorted(metrics_dict.items())]
            name, _, k = metric.partition("@")
            if k.isdecimal() and name.lower() in [*map(str.lower, known), *ALIASES]:
                hint = f"the cut-off is topk's to say: metrics=[{name!r}] and topk=[{k}]."
            else:
                hint = meant(metric, known)
            raise UserError(f"metrics={shown(metrics)}: there is no metric {metric!r}; {hint}")


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
    if lists and "full" not in modes and not (isinstance(more, list) and "full" in more):
        raise UserError(
            f"metrics={metrics}: {lists[0]} is of the lists that all users get, each from the "
            f"whole catalogue; set eval_args.mode=full (now {', '.join(sorted(modes))}), or "
            "more_candidates=['full']."
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


def check_memory(config: Config, events: int) -> None:
    """RecBole writes the sequence before each event out, one number of 64 bits for each of its
    items and columns.

    Args:
        events: of the data.

    Raises:
        UserError: the machine has not the memory for one column of them.
    """
    length = config["MAX_ITEM_LIST_LENGTH"]
    if config["MODEL_TYPE"] == ModelType.SEQUENTIAL and 8 * length * events > _memory():
        raise UserError(
            f"MAX_ITEM_LIST_LENGTH={length} must be smaller: with {events:,} events, "
            f"{8 * length * events / 2**30:,.0f} GiB and more are "
            f"needed, and this machine has {_memory() / 2**30:,.0f}."
        )


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_folders(config: Config) -> None:
    """Can the folders of a run be written, and are the checkpoint that it begins from and its
    candidates there?

    Raises:
        UserError: one is a file, or in a folder that is one or cannot be written; the message names
            both. Or the checkpoint is no folder, or the candidates are no file.
    """
    given = config["candidates_file"]
    if given and not user_path(given).is_file():
        raise UserError(f"candidates_file={given!r} must be a file that is there.")
    start = config["sft_checkpoint"] if config["model"] == MODEL else None
    if start and not user_path(start).is_dir():
        raise UserError(
            f"sft_checkpoint={start!r} must be a folder that is there: of a run, or 'sft' or "
            "'sdpo' in one."
        )
    for key in ("checkpoint_dir", "run_dir"):
        path = os.path.abspath(os.path.expanduser(config[key])) if config[key] else None
        if path and os.path.exists(path) and not os.path.isdir(path):
            raise UserError(f"{key}={config[key]!r} must be a folder, and is a file.")
        while path and not os.path.lexists(path):
            path = os.path.dirname(path)
        if path and not os.path.isdir(path):
            raise UserError(
                f"{key}={config[key]!r} must be a folder, and {path!r} above it is a file."
            )
        if path and not os.access(path, os.W_OK | os.X_OK):
            raise UserError(
                f"{key}={config[key]!r} must be a folder that can be written, and {path!r} cannot."
            )


def check_settings(config: Config) -> Settings:
    """Our settings from a configuration, checked, together with what they ask of RecBole's.

    Raises:
        UserError: a key that nobody reads, or a value that is wrong or does not go with another.
    """
    known = (
        set(config.internal_config_dict)
        | {key for keys in config.parameters.values() for key in keys}
        | RECBOLE_KEYS
    )
    ours, of_every_model = config["model"] == MODEL, having(Role.EVERY_MODEL)
    if ours:
        check_unknown(config.external_config_dict, known, names())
    else:
        check_unknown(config.external_config_dict, known, of_every_model, config.model_class)
    _check_valid_metric(config)
    check_columns(config)
    _check_model(config)
    # such as the beta of AsymKNN
    theirs = set() if ours else set(config.internal_config_dict) - of_every_model
    settings = Settings.from_mapping(
        {key: value for key, value in config.final_config_dict.items() if key not in theirs}
    )
    _check_more_candidates(config, settings)
    _check_lists(config, settings)
    _check_answers(config, settings)
    ranks = config["eval_type"] == EvaluatorType.RANKING
    if settings.popularity_discount and (not ranks or all(map(_is_of_answers, config["metrics"]))):
        raise UserError(
            f"popularity_discount={settings.popularity_discount} is for metrics of a ranking, and "
            f"{config['metrics']} are none."
        )
    args = config["eval_args"]
    if settings.held_out_items and (
        args["split"] != LEAVE_ONE_OUT or args["order"] != "TO" or config["benchmark_filename"]
    ):
        raise UserError(
            f"held_out_items={settings.held_out_items} needs eval_args with split={LEAVE_ONE_OUT} "
            "and order=TO, and no benchmark_filename: the tests are users' last events."
        )
    if not ours:
        if settings.resume:
            raise UserError(
                f"resume={settings.resume!r} is for {MODEL}; {config['model']} starts anew."
            )
        return settings
    backbone = settings.backbone
    # Weights, gradients, AdamW's two moments.
    bytes_needed = 16 * 12 * backbone.scratch_layers * backbone.scratch_hidden_size**2
    if backbone.name == "scratch" and bytes_needed > _memory():
        raise UserError(
            f"scratch_hidden_size={backbone.scratch_hidden_size} with "
            f"scratch_layers={backbone.scratch_layers} must be smaller: "
            f"training takes {bytes_needed / 2**30:,.0f} GiB and more, and this machine has "
            f"{_memory() / 2**30:,.0f}."
        )
    if settings.reference == "cache" and not settings.fixed_negatives:
        raise UserError(
            "reference='cache' needs negatives that stay the same; set fixed_negatives=True, or "
            "reference='auto'."
        )
    _check_full_sort(config, settings)
    for stage in ("sft", "sdpo"):
        own = getattr(settings, stage)
        if own.targets_per_step and own.gradient_accumulation > 1:
            raise UserError(
                f"{stage}_targets_per_step={own.targets_per_step} and "
                f"{stage}_gradient_accumulation={own.gradient_accumulation} both say "
                "when the optimizer steps; give one of them."
            )
    for key in sorted(WITHOUT_EFFECT & set(config.external_config_dict)):
        own = (
            f"its stages have sft_{key} and sdpo_{key}"
            if f"sft_{key}" in names()
            else "see recbole-sdpo settings"
        )
        getLogger().warning(f"{key}={config[key]!r} has no effect on {MODEL}; {own}.")
    _warn_of_constants(settings)
    in_text, aligned = (
        settings.prompt_style == "candidates",
        OBJECTIVES[settings.objective].negatives,
    )
    if settings.negative_sources and not (in_text or aligned):
        getLogger().warning(
            f"negative_sources={settings.negative_sources!r} has no effect on "
            f"objective={settings.objective!r}, which has no negatives."
        )
    if aligned or in_text:
        args = config["train_neg_sample_args"]
        negatives = args["sample_num"]
        if not isinstance(negatives, int) or negatives < 1:
            raise UserError(
                f"train_neg_sample_args.sample_num={negatives!r}: "
                f"objective={settings.objective!r} with prompt_style="
                f"{settings.prompt_style!r} needs 1 or more negatives; or set objective=sft and "
                "prompt_style=history."
            )
        sources = settings.negative_sources or {args["distribution"]: 1.0}
        if args["alpha"] != 1 and "popularity" not in sources:
            getLogger().warning(
                f"train_neg_sample_args.alpha={args['alpha']} has no effect on "
                f"{' and '.join(map(repr, sources))} negatives."
            )
        if settings.negative_sources and args["distribution"] != "uniform":
            getLogger().warning(
                f"train_neg_sample_args.distribution={args['distribution']!r} has no effect with "
                f"negative_sources={settings.negative_sources!r}."
            )
        _check_dynamic(args, settings)
        _check_sources(args, settings)
        if in_text and aligned and negatives >= settings.prompt_candidates:
            raise UserError(
                f"train_neg_sample_args.sample_num={negatives}: the negatives are among the "
                f"{settings.prompt_candidates} candidates "
                "of the prompt (prompt_candidates); it must be 1 to "
                f"{settings.prompt_candidates - 1}."
            )
    if in_text and "full" in (*config["eval_args"]["mode"].values(), *settings.more_candidates):
        raise UserError(
            f"eval_args.mode={config['eval_args']['mode']}, "
            f"more_candidates={settings.more_candidates}: {NO_FULL_RANKING}"
        )
    return settings


def _warn_of_constants(settings: Settings) -> None:
    """Say which of those that were given the objective does not read."""
    objective = OBJECTIVES[settings.objective]
    read = {*objective.reads, *(["sft_weight"] if objective.negatives else [])}
    for key in Constants._fields:
        value = getattr(settings, key)
        if value != Constants._field_defaults[key] and key not in read:
            getLogger().warning(
                f"{key}={value:g} has no effect on objective={settings.objective!r}, which reads "
                f"{', '.join(sorted(read & {*Constants._fields})) or 'no such setting'}."
            )


def _check_sources(args: Mapping[str, Any], settings: Settings) -> None:
    """Can negatives come from where ``negative_sources`` says?"""
    sources = settings.negative_sources
    if not sources:
        return
    given, most = f"negative_sources={sources!r}", OBJECTIVES[settings.objective].negatives
    if SELF in sources and settings.prompt_style == "candidates":
        raise UserError(
            f"{given}: {SELF!r} ranks the whole catalogue, and prompt_style='candidates' shows a "
            "few; use prompt_style='history'."
        )
    if not most:
        return
    if args["dynamic"]:
        raise UserError(
            f"{given}: train_neg_sample_args.dynamic=True picks among draws of one source; leave "
            "one of the two out."
        )
    each = shares(sources, int(min(args["sample_num"], most)))
    for name, share in each.items():
        if not share:
            raise UserError(
                f"{given}: of {sum(each.values())} negatives, {name!r} would give none; raise its "
                "weight, or train_neg_sample_args.sample_num."
            )
    if SELF in sources and settings.fixed_negatives:
        raise UserError(
            f"{given}: {SELF!r} changes as the policy learns; set fixed_negatives=False."
        )


def _check_dynamic(args: Mapping[str, Any], settings: Settings) -> None:
    """Each negative is then the one of ``candidate_num`` draws that the model scores highest."""
    if not args["dynamic"]:
        return
    draws = args["candidate_num"]
    if not isinstance(draws, int) or draws < 2:
        raise UserError(
            f"train_neg_sample_args.candidate_num={draws!r}: with dynamic=True, give 2 or more "
            "draws to a negative."
        )
    if settings.fixed_negatives or settings.prompt_style == "candidates":
        raise UserError(
            "train_neg_sample_args.dynamic=True draws negatives anew by the model's scores; it "
            "needs fixed_negatives=False and "
            f"prompt_style='history' (now {settings.fixed_negatives} and "
            f"{settings.prompt_style!r})."
        )


def _check_model(config: Config) -> None:
    """What RecBole's models and transforms find out when they are built, or never."""
    width, heads = config["hidden_size"], config["n_heads"]
    if isinstance(width, int) and isinstance(heads, int) and (heads < 1 or width % heads):
        raise UserError(f"hidden_size={width} must be a multiple of n_heads={heads}.")
    if isinstance(config["reg_weight"], list) and config["weight_decay"]:
        raise UserError(
            f"weight_decay={config['weight_decay']} must be 0 for {config['model']}, whose "
            "reg_weight is a list."
        )
    args = config["train_neg_sample_args"]
    if config["model"] != MODEL and args["distribution"] != "none":
        if args["sample_num"] < 1:
            raise UserError(
                f"train_neg_sample_args.sample_num={args['sample_num']} must be 1 or more for "
                f"{config['model']}."
            )
        if args["dynamic"] and args["candidate_num"] < 1:
            raise UserError(
                "train_neg_sample_args.candidate_num=0 must be 1 or more with dynamic=True."
            )
    pairs = config["MODEL_INPUT_TYPE"] == InputType.PAIRWISE and config["loss_type"] != "CE"
    if config["model"] != MODEL and args["distribution"] == "none" and pairs:
        raise UserError(
            "train_neg_sample_args must ask for negatives, such as {'sample_num': 1}: "
            f"{config['model']} learns from pairs."
        )
    if config["enable_amp"] and config["model"] != MODEL and config["device"].type == "cpu":
        raise UserError(
            "enable_amp=True must be false on a CPU, where RecBole's mixed precision fails for "
            "some models."
        )
    transform, sequential = config["transform"], config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    if transform == config.internal_config_dict["transform"]:
        return
    needs = {"mask_itemseq": "mask_ratio", "crop_itemseq": "eta", "reorder_itemseq": "beta"}.get(
        transform
    )
    if transform and (not sequential or config["model"] == MODEL):
        raise UserError(
            f"transform={transform!r} must be null for {config['model']}: it is for RecBole's "
            "sequential models."
        )
    if needs and not isinstance(config[needs], int | float):
        raise UserError(f"transform={transform!r} needs {needs}, a number from 0 to 1.")
    if config.internal_config_dict["transform"]:
        raise UserError(
            f"transform={transform!r} must be {config.internal_config_dict['transform']!r} for "
            f"{config['model']}."
        )


def _check_valid_metric(config: Config) -> None:
    """It must be one that is computed."""
    metrics = [metric.lower() for metric in config["metrics"]]
    ranked = config["eval_type"] == EvaluatorType.RANKING
    computed = []
    for metric in metrics:
        needed = metrics_dict[metric].metric_need
        alone = not ranked or _is_of_answers(metric) or "rec.meanrank" in needed
        computed += [metric] if alone else [f"{metric}@{k}" for k in config["topk"]]
    if config["valid_metric"].lower() not in computed:
        raise UserError(
            f"valid_metric={config['valid_metric']!r} is not computed; with these metrics and "
            "topk, "
            f"it must be one of {', '.join(computed)}."
        )


def _check_more_candidates(config: Config, settings: Settings) -> None:
    file, mode = settings.candidates_file, config["eval_args"]["mode"]
    if file and (config["eval_type"] != EvaluatorType.RANKING or "labeled" in mode.values()):
        raise UserError(
            f"candidates_file={file!r} is for metrics of a ranking; eval_args.mode={mode} must "
            f"rank items and metrics={config['metrics']} be of their order."
        )
    modes = [FILE_MODE if file else mode["test"], *settings.more_candidates]
    if settings.more_candidates and (
        config["eval_type"] != EvaluatorType.RANKING or len(set(modes)) < len(modes)
    ):
        raise UserError(
            f"more_candidates={settings.more_candidates} must differ from each other and from "
            "eval_args.mode="
            f"{config['eval_args']['mode']['test']!r}, and both must rank items."
        )


def _check_lists(config: Config, settings: Settings) -> None:
    """What all users get is judged where they get it from the whole catalogue alone."""
    modes = {*config["eval_args"]["mode"].values(), *settings.more_candidates}
    if is_of_lists(config["valid_metric"]) and modes != {"full"}:
        raise UserError(
            f"valid_metric={config['valid_metric']!r} must be of a target's rank, such as NDCG@5: "
            f"there are candidates ({', '.join(sorted(modes))}) that it does not judge."
        )


def is_of_lists(metric: str) -> bool:
    """Is ``metric``, such as ``ItemCoverage@10``, of what all users get, and not of each target's
    rank?"""
    kind = metrics_dict.get(metric.lower().partition("@")[0])
    return kind is not None and "rec.items" in kind.metric_need


def _is_of_answers(metric: str) -> bool:
    """Does the model have to write for it?"""
    return any(need.startswith("answers.") for need in metrics_dict[metric.lower()].metric_need)


def _check_answers(config: Config, settings: Settings) -> None:
    asked = [metric for metric in config["metrics"] if _is_of_answers(metric)]
    if asked and config["model"] != MODEL:
        raise UserError(
            f"metrics={config['metrics']}: {asked[0]} needs an answer in words, and "
            f"{config['model']} writes none; leave it out."
        )
    modes = [*config["eval_args"]["mode"].values(), *settings.more_candidates]
    if asked and not all(re.fullmatch("(uni|pop)[0-9]+", mode) for mode in modes):
        raise UserError(
            f"metrics={config['metrics']}: {asked[0]} needs sampled candidates, such as "
            f"eval_args.mode=uni19 (now {', '.join(modes)})."
        )
    if asked and settings.decoding == "constrained" and settings.max_new_tokens:
        getLogger().warning(
            f"max_new_tokens={settings.max_new_tokens} has no effect with decoding='constrained', "
            "which writes whole titles."
        )
    if config["model"] == MODEL and not asked:
        for key in sorted({"decoding", "max_new_tokens"} & set(config.external_config_dict)):
            getLogger().warning(
                f"{key}={config[key]!r} has no effect without answers; add ValidRatio or GenHit "
                "to metrics."
            )


def check_topk(config: Config, items: int) -> None:
    """RecBole's top k must not ask for more items than there are.

    Args:
        items: of the catalogue, without the padding.

    Raises:
        UserError: it does; RecBole would find out at its first evaluation.
    """
    if config["eval_type"] == EvaluatorType.RANKING and max(config["topk"]) > items:
        raise UserError(
            f"topk={config['topk']} asks for more than the {items} items that there are; give "
            "smaller ones."
        )


def _check_full_sort(config: Config, settings: Settings) -> None:
    """Bounds in place of scores serve metrics of the top k alone."""
    if settings.full_sort == "topk":
        modes = {*config["eval_args"]["mode"].values(), *settings.more_candidates}
        if "full" not in modes:
            getLogger().warning(
                f"full_sort='topk' has no effect on {', '.join(sorted(modes))}: candidates that "
                "are a sample."
            )
            return
        for metric in config["metrics"]:
            needed = set(metrics_dict[metric.lower()].metric_need)
            if needed & {"rec.score", "rec.meanrank"}:
                raise UserError(
                    f"full_sort='topk' finds the top k alone, and metric {metric} needs all "
                    "scores; set full_sort='exact'."
                )
        if settings.popularity_discount:
            raise UserError(
                "full_sort='topk' finds the top k by log-probability, which "
                f"popularity_discount={settings.popularity_discount} does "
                "not rank by; set full_sort='exact'."
            )


def check_unknown(
    given: Mapping[str, Any],
    known: set[str],
    ours: Collection[str],
    model_class: type | None = None,
) -> None:
    """Refuse keys that nobody reads.

    Args:
        given: what the user set.
        known: RecBole's keys.
        ours: those of our settings that count for the model; the others do no harm.
        model_class: of RecBole's, of which a few read keys that are not in their defaults.

    Raises:
        UserError: naming the key and the nearest right one.
    """
    for key in given:
        if key in known or key in names() or (model_class and _reads(model_class, key)):
            continue
        hint = meant(
            key,
            [*sorted(ours), *sorted(known)],
            "recbole-sdpo settings lists ours, RecBole's documentation its own.",
        )
        raise UserError(f"Unknown setting {key!r}={given[key]!r}; {hint}")


def _reads(model_class: type, key: str) -> bool:
    """Does the module of a model name the key, or one of those of RecBole that it builds on?"""
    modules = {
        inspect.getmodule(cls)
        for cls in model_class.__mro__
        if issubclass(cls, AbstractRecommender)
    }
    texts = [
        inspect.getsource(module)
        for module in modules
        if module and getattr(module, "__file__", None)
    ]
    return any(f'"{key}"' in text or f"'{key}'" in text for text in texts)
