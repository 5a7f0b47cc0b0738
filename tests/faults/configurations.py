"""Random settings, from the tables that declare them: a new setting is tried by being declared."""

from __future__ import annotations

import ast
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from tests.faults import oracle, toy
from tests.faults.judge import Wrong, ended_well
from tests.faults.trial import WAYS, Trial

LONG, SHORT = 1000, 8

MODELS = ["SDPO-LLM"] * 6 + ["Pop", "BPR", "SASRec", "GRU4Rec", "FM", "LightGCN", "ItemKNN", "FPMC"]

LASTING = re.compile(
    r"(^|_)epochs$|^eval_step$|^(sft_|sdpo_)?stopping_step$|max_new_tokens|^worker$|^nproc$"
)
"""Of these a large value is right, and takes long."""

# fmt: off
HOSTILE = [
    "self", "value", "param", "config_dict", "", "   ", "é ☃ 日本", "x" * 300, "x" * 20_000,
    "a\nb",
    "'", '"', "[1,", "{'a': 1", "{}", "[]", "()", "None", "null", "~", "True", "nan", "inf",
    "-inf", "1e999", "0x10", "1_000", "1e3", "../x", "a/b", "%s{0}", "\\d+(", "--seed",
    "!!python/object/apply:os.getcwd []",
]
"""Texts that mean something to someone. Some are right for some settings."""

NUMBERS = [
    0, 1, 2, 3, -1, -(10**9), 10**6, 10**12, 2**31, 2**63, 10**400,
    0.0, 0.5, 1.0, -0.5, 1e-12, 1e30, math.inf, -math.inf, math.nan,
]

OTHERS = [
    None, True, False, [], {}, [1], ["a"], [None], {"a": 1}, {"a": {"b": [1]}},
    [[1, 2], [3]], ["title"], [0.5, 0.5],
]

# fmt: on
PATHS = [
    "",
    "   ",
    "/dev/null/x",
    "/proc/none/x",
    "x" * 300,
    "some/new/folder",
    "a file",
    "é ☃",
    "~none/x",
    0,
    [],
    {},
    True,
]
"""For settings that name a place; nothing outside a trial's folder is written."""


@dataclass(frozen=True)
class Declared:
    """A setting as it is declared.

    Attributes:
        right: values that it may have.
        holds: is a value, of any type, one that it may have?
    """

    name: str
    right: list[Any]
    holds: Callable[[Any], bool] = lambda value: True

    def is_path(self) -> bool:
        """Does its value name a file or folder?"""
        return bool(
            re.search(r"(_path|_dir|^run_dir|^resume|_checkpoint|^backbone|templates)$", self.name)
        )


@cache
def ours() -> list[Declared]:
    """The settings of the package, as it declares them."""
    from recbole_sdpo.settings import SETTINGS

    declared = []
    for key, setting in SETTINGS.items():
        choices = re.search(r"one of (.+)$", setting.valid_words)
        values = [value for kind in setting.kinds for value in _of_kind(kind)]
        if choices:
            values = re.split(r", (?:or )?| or ", choices[1])
        right = [value for value in values if _holds(setting.check, value)]
        declared.append(Declared(key, right, partial(_fits, setting.kinds)))
    return declared


@cache
def recboles(model: str) -> list[Declared]:
    """RecBole's settings and those of one of its models: as the package declares them, or by
    type."""
    import recbole

    properties = Path(recbole.__path__[0]) / "properties"
    defaults: dict[str, Any] = {}
    for file in (
        "overall.yaml",
        "dataset/sample.yaml",
        "quick_start_config/sequential.yaml",
        f"model/{model}.yaml",
    ):
        if (properties / file).is_file():
            defaults |= yaml.safe_load((properties / file).read_text(encoding="utf-8")) or {}
    try:
        from recbole_sdpo.checks.recbole_rules import RECBOLE as rules
    except ImportError:
        rules = {}
    declared = [Declared(name, [*rule.examples], rule.holds) for name, rule in rules.items()]
    for name, default in defaults.items():
        if name not in rules:
            kinds = (dict, list, str, type(None)) if default is None else (type(default),)
            declared.append(Declared(name, [default], partial(_fits, kinds)))
    return declared


def _holds(check: Callable[[Any], bool], value: Any) -> bool:
    try:
        return bool(check(value))
    except Exception:  # a check need not bear values of a wrong type
        return False


def _of_kind(kind: Any) -> list[Any]:
    if get_origin(kind) is list:
        return [[value] for value in _of_kind(get_args(kind)[0])] + [[]]
    return {
        int: [0, 1, 2, 8, 300],
        float: [0.0, 0.1, 0.5, 1.0, 2],
        bool: [True, False],
        type(None): [None],
        str: ["title", "items"],
    }.get(kind, [])


ALIKE = {float: {int, bool}, int: {bool}, bool: {int}, list: {str}}
"""Of a type, others whose values RecBole takes for it."""


def _fits(kinds: tuple[Any, ...], value: Any) -> bool:
    """Is the value of one of these types, or as good as?"""
    if str in kinds or value is None:
        return True  # what a text may be, its grammar says
    kinds = {get_origin(kind) or kind for kind in kinds}
    kinds |= set().union(*(ALIKE.get(kind, ()) for kind in kinds))
    whole = isinstance(value, float) and value.is_integer()
    return isinstance(value, tuple(kinds)) or (int in kinds and whole)


# fmt: off
PARTS: dict[str, dict[str, list[Any]]] = {
    "eval_args": {
        "split": [
            {"LS": "valid_and_test"}, {"RS": [0.8, 0.1, 0.1]}, {"TS": [6, 1, 1]},
            {"LS": "test_only"}, {"RS": [1]}, "LS", {}, None, {"LS": 1},
        ],
        "order": ["TO", "RO", "to", None, 1, "X"],
        "group_by": ["user", "none", None, "item", 1],
        "mode": [
            "full", "uni5", "pop5", "uni0", "uni10000", "labeled", "uni", "", None, 5,
            {"valid": "uni5", "test": "full"}, {"test": "uni5"}, {},
        ],
    },
    "train_neg_sample_args": {
        "distribution": ["uniform", "popularity", "none", "other", None, 1, ""],
        "sample_num": [0, 1, 2, 22, 23, 1000, 10**9, -1, 1.5, "2", None, True, []],
        "alpha": [0, 0.5, 2.0, -1, "x", None, math.inf, math.nan],
        "dynamic": [True, False, "x", None, 1],
        "candidate_num": [0, 1, 2, 30, -1, "x", None],
    },
}

GRAMMARS: dict[str, list[Any]] = {
    "metrics": [
        ["AUC"], "NDCG", ["Hit", "MRR"], ["GAUC"], ["ValidRatio", "NDCG"], ["hr"], ["NDCG", "NDCG"],
        ["RMSE"], ["ItemCoverage", "NDCG"], [1],
    ],
    "topk": [1, [1, 2, 24], [24, 1], [25], [0], "5", [5, 5], [1.5], None, [], [True]],
    "valid_metric": ["NDCG@5", "ndcg@1", "MRR@10", "NDCG", "Hit@5@1", "@", "AUC", "LogLoss"],
    "load_col": [
        {"inter": ["user_id", "item_id", "timestamp"]}, {"inter": ["user_id", "item_id"]},
        {"inter": ["nothing"]}, {}, None, "self", [1], {"inter": "user_id"},
    ],
    "unload_col": [{"inter": ["timestamp"]}, {"item": ["title"]}, {"inter": "x"}, {"inter": None}],
    "unused_col": [
        {"inter": ["timestamp"]}, {"inter": ["user_id"]}, "x", [], {"x": 1}, {"inter": 3},
    ],
    "threshold": [{"timestamp": 0}, {"rating": 3}, "x", {"item_id": 1}, {"timestamp": "x"}, 3],
    "val_interval": [
        {"timestamp": "[0,inf)"}, {"timestamp": "[0,1]"}, {"x": "[0,1]"}, "x",
        {"timestamp": "self"}, {"timestamp": 4},
    ],
    "user_inter_num_interval": [
        "[0,inf)", "[4,inf)", 4, "[4,]", "4,inf", "self", "[9,inf)", "[inf,0)", "(0,8]", "", None,
        "[a,b]",
    ],
    "item_inter_num_interval": ["[0,inf)", "(1,inf)", "self", "[100,inf)", "[,]", 3, "[1,2", None],
    "filter_inter_by_user_or_item": [True, False, "x", None, 3],
    "rm_dup_inter": ["first", "last", "none", "x", 1, True],
    "discretization": [
        {"timestamp": {"method": "ED", "bucket": 3}}, {"timestamp": "x"}, "x",
        {"x": {"method": "LD"}}, {"timestamp": {"method": "Z"}},
    ],
    "normalize_field": [["timestamp"], ["x"], "timestamp", 3, ["user_id"]],
    "normalize_all": [True, False, "x"],
    "transform": ["mask_itemseq", "inverse_itemseq", "crop_itemseq", "x", 1, ["x"], "user_defined"],
    "clip_grad_norm": [{"max_norm": 5}, {"x": 1}, 5, "x", {"max_norm": "x"}, {}],
    "learner": ["adam", "sgd", "x", 1, None, "sparse_adam", "Adam"],
    "USER_ID_FIELD": ["user_id", "item_id", "nobody", "", None, 1, "user_id:token"],
    "ITEM_ID_FIELD": ["item_id", "user_id", "nothing", "timestamp"],
    "TIME_FIELD": ["timestamp", "never", "user_id", None, ""],
    "RATING_FIELD": ["rating", "timestamp", 1],
    "NEG_PREFIX": ["neg_", "", None, "x", 1, "user_id"],
    "LIST_SUFFIX": ["_list", "", None, 1, "_length"],
    "ITEM_LIST_LENGTH_FIELD": ["item_length", "item_id", "", None],
    "LABEL_FIELD": ["label", "item_id", "timestamp", None, ""],
    "seq_len": [{"timestamp": 3}, "x", {"x": 1}, {"title": 2}, {"title": "x"}],
    "field_separator": ["\t", ",", " ", "", "ab", None, "."],
    "seq_separator": [" ", ",", "", "  ", None, "."],
    "benchmark_filename": [["train", "valid", "test"], "x", ["a"], [], [1, 2, 3]],
    "additional_feat_suffix": [["x"], "x", ["inter"], 1],
    "alias_of_item_id": [["item_id_list"], ["title"], "x", [1]],
    "preload_weight": [{"item_id": "title"}, "x", {"x": "y"}],
    "numerical_features": [["timestamp"], "x", [1], ["title"]],
    "state": ["INFO", "debug", "error", "WARNING", "x", "", None, 1, "CRITICAL"],
    "gpu_id": ["0", "", "7", 3, "x", None, "0,1"],
    "dataset": ["toy", "nothing", "../toy", "a/b", "", ".", "..", "toy/", "x" * 300, "é"],
    "encoding": ["utf-8", "latin-1", "x", None, 1, "utf-16"],
    "loss_type": ["CE", "BPR", "x", 1, None],
    "more_candidates": [
        ["full"], ["pop5"], ["uni5"], ["pop5", "full"], ["uni100"], "pop5", [5], ["labeled"],
    ],
    "title_fields": [
        ["title"], "title", ["title", "title"], ["x"], [], ["item_id"], ["title", "item_id"],
    ],
    "prompt_templates": ["movies", "items", "x", "x.yaml", ".", "../items", ""],
    "lora_target_modules": ["all-linear", ["q_proj"], ["x"], [], "q_proj", [""], ".*", "("],
    "lora_layers": [[0], [1], [], [-1], [0, 0], [10**9]],
    "backbone": [
        "scratch", "toy", "auto", "nothing", "a file", "x.gguf", "", ".", "smollm2-135m",
        "org/name", "/dev/null",
    ],
}
# fmt: on
"""Values for settings whose grammar is more than a type: two that are often right, then others."""


def value_for(setting: Declared, draw: random.Random, evil: str, right: bool) -> Any:
    """A value: a right one, or one at a bound, of a wrong type, or hostile."""
    if setting.name in PARTS:
        part = draw.choice([*PARTS[setting.name]])
        return {part: draw.choice(PARTS[setting.name][part][: 2 if right else None])}
    if setting.name in GRAMMARS and (right or draw.random() < 0.6):
        return draw.choice(GRAMMARS[setting.name][: 2 if right else None])
    if right:
        return draw.choice(setting.right or [None])
    if setting.is_path() and draw.random() < 0.9:
        return draw.choice(PATHS)
    if draw.random() < 0.15:
        return draw.choice(
            [evil, f"[{evil}]", f"{{'a': {evil}}}", f"!!python/object/apply:eval ['{evil}']"]
        )
    values = PATHS if setting.is_path() else draw.choice([NUMBERS, NUMBERS, OTHERS, HOSTILE])
    if LASTING.search(setting.name):
        values = [
            value
            for value in values
            if not isinstance(value, int | float) or not 4 < value < math.inf
        ]
        values = [value for value in values if value not in ("1_000", "1e3", "0x10")]
    return draw.choice(values)


def attempt(trial: Trial) -> str:
    """Up to three settings of a toy run get some value."""
    draw = trial.draw
    model = draw.choice(MODELS)
    recbole = recboles(model)
    tables = [ours(), ours(), recbole] if model == "SDPO-LLM" else [recbole] * 5 + [ours()]
    by_grammar = [Declared(name, []) for name in GRAMMARS | PARTS]
    drawn: dict[str, Any] = {}
    declared: dict[str, Declared] = {}
    all_right = draw.random() < 0.45
    for _ in range(draw.choice([1, 1, 2, 3])):
        setting = draw.choice(draw.choice([*tables, by_grammar]))
        drawn[setting.name], declared[setting.name] = (
            value_for(setting, draw, trial.evil, all_right),
            setting,
        )
    way = draw.choice(WAYS)
    if way == "arguments":
        drawn = {key: value for key, value in drawn.items() if "=" not in str(value)}
    trial.what = (
        f"{model}, {way}: {', '.join(f'{key}={str(value)[:80]!r}' for key, value in drawn.items())}"
    )
    if drawn.get("backbone") == "toy":
        drawn["backbone"] = str(trial.backbone)
    (trial.folder / "a file").write_text("something\n")

    base = toy.settings(model, data_path=str(trial.data))
    for key in PARTS:
        if isinstance(drawn.get(key), dict):
            drawn[key] = base.get(key, {}) | drawn[key]
    ending = trial.run(base | drawn, way, model)
    trial.check_marker()
    # Where values are right by themselves and not together, any setting that mends it may be named.
    others = [setting.name for setting in (*ours(), *recbole) if "_" in setting.name]
    if not ended_well(
        ending, [*drawn, *others, *(part for parts in PARTS.values() for part in parts)]
    ):
        return "sentence"
    for key, value in drawn.items():
        if not _holds(declared[key].holds, _as_read(value, way)) and key not in _warned_of(
            ending.err
        ):
            raise Wrong(
                "wrong result",
                f"{key}={str(value)[:80]!r} is nothing that it may be, and nothing was said of it",
            )
    files = [*trial.folder.rglob("result.json")]
    if not files:
        raise Wrong("wrong result", "it ended well and left no result.json")
    for file in files:
        check(file.parent, drawn)
    return "result"


def _as_read(value: Any, way: str) -> Any:
    """What a value means where it was given as text."""
    value = str(value) if way == "arguments" else value  # where nan is a word
    if way == "file" or not isinstance(value, str):
        return value
    try:
        read = ast.literal_eval(value)
        large = isinstance(read, int | float) and abs(read) >= 2**63
        return value if large else read  # 1e999, too, stays text
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        words = {"true": True, "false": False, "null": None, "~": None}
        return words.get(value.strip().lower(), value)


def _warned_of(err: str) -> str:
    return "\n".join(line for line in err.splitlines() if "WARNING" in line)


FILTERS = re.compile(
    "interval|FIELD|_col$|separator|benchmark|rm_dup|encoding|normalize|discretization|threshold|"
    "alias|_PREFIX|_SUFFIX|^dataset$|"
    "^data_path$|seq_len|^eval_args$|max_eval_targets|preload|additional_feat"
)
"""Settings that may change who is tested on what."""


def check(run_dir: Path, drawn: dict[str, Any]) -> None:
    """Is the result of a run right?

    Raises:
        Wrong: a number in it is not.
    """
    settings = oracle.result_of(run_dir)["settings"]
    if settings.get("eval_args", {}).get("split") == {"LS": "valid_and_test"}:
        oracle.check_metrics(run_dir)
        if not any(FILTERS.search(key) for key in drawn):
            oracle.check_targets(run_dir, oracle.toy_targets())
