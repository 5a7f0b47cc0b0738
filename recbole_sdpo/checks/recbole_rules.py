"""What each of RecBole's settings must be, alone."""

from __future__ import annotations

import codecs
import re
from functools import cache
from pathlib import Path
from typing import Any

import recbole
import yaml
from recbole.evaluator.register import metrics_dict

from recbole_sdpo.compat import TEACHERS
from recbole_sdpo.rules import ANY, FLAG, Parts, Rule, dict_of, list_of, number, one_of, text, whole
from recbole_sdpo.settings import LEAVE_ONE_OUT, MODE, MODEL
from recbole_sdpo.values import Loader, is_a, read_yaml

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
    "an interval as text, such as '[4,inf)', or several with ';' between",
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
    others = [other for other in known.get(key, {}).values() if is_a(other, (int, float))]
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
