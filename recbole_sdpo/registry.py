"""The places where RecBole looks things up, and what we put there."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import recbole.trainer
from recbole.config import Config
from recbole.evaluator.register import (
    metric_information,
    metric_types,
    metrics_dict,
    smaller_metrics,
)

from recbole_sdpo import compat
from recbole_sdpo.checks.given import check_dataset, check_given
from recbole_sdpo.data import dataset
from recbole_sdpo.evaluator.answers import OF_ANSWERS
from recbole_sdpo.evaluator.lists import OF_LISTS
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.settings import MODEL, merged_parts
from recbole_sdpo.trainer import SDPOTrainer
from recbole_sdpo.values import read_yaml

PROPERTIES = Path(__file__).parent / "properties"

# What RecBole loads of a dataset that it does not know: no time, without which there is no order.
RECBOLE_LOADS = {"inter": ["user_id", "item_id"]}


def register() -> None:
    """Make RecBole find the model, its trainer and its default settings under the name
    ``SDPO-LLM``."""
    compat.meet_newer_libraries()
    compat.import_models()
    name = f"recbole.model.sequential_recommender.{MODEL.lower()}"
    module = types.ModuleType(name, SDPOLLM.__doc__)
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    setattr(module, MODEL, SDPOLLM)
    sys.modules[name] = module
    setattr(recbole.trainer, f"{MODEL}Trainer", SDPOTrainer)
    for name, kind in (OF_ANSWERS | OF_LISTS | {"gauc": compat.GAUC}).items():
        metrics_dict[name] = kind
        metric_information[name], metric_types[name] = kind.metric_need, kind.metric_type
        if kind.smaller and name not in smaller_metrics:
            smaller_metrics.append(name)
    compat.hand_out_counts()
    compat.take_values_as_data()
    dataset.install()
    compat.heed_visible_gpus()
    compat.never_unpickle()
    Config._load_internal_config_dict = _load_internal_config_dict


_recbole_load = Config._load_internal_config_dict


def _load_internal_config_dict(self: Config, model: str, model_class: type, dataset: str) -> None:
    """RecBole's defaults, and for our model ours: RecBole reads a model's defaults from its own
    folder only.

    Raises:
        UserError: the dataset's name leads elsewhere, or a setting is wrong.
    """
    check_dataset(dataset)
    _recbole_load(self, model, model_class, dataset)
    if model == MODEL:
        add_defaults(self, default_settings(dataset) | _read(PROPERTIES / f"{MODEL}.yaml"))


def default_settings(dataset: str) -> dict[str, Any]:
    """What every model runs with under our command, and what belongs to the dataset."""
    return _read(PROPERTIES / "overall.yaml") | _read(PROPERTIES / "dataset" / f"{dataset}.yaml")


def add_defaults(config: Config, defaults: dict[str, Any]) -> None:
    """Put ``defaults`` under what the user gave, key by key in the settings that are
    dictionaries."""
    internal, external = config.internal_config_dict, config.external_config_dict
    internal |= defaults
    if internal["load_col"] == RECBOLE_LOADS:
        fields = [
            external.get(key, internal[key])
            for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")
        ]
        internal["load_col"] = {"inter": fields}
    if external.get("field_separator") == "\\t":  # as a shell hands it on
        external["field_separator"] = "\t"
    check_given(external, internal, config.model)
    for key in ("data_path", "checkpoint_dir"):
        if key in external:
            external[key] = os.path.expanduser(external[key])
    external |= merged_parts(internal, external)
    mode = external.get("eval_args", internal["eval_args"])["mode"]
    if internal["train_neg_sample_args"] is None and "labeled" not in str(mode):
        # RecBole's context-aware models learn from labels in their data; ranked among samples, they
        # learn from samples.
        internal["train_neg_sample_args"] = {"distribution": "uniform", "sample_num": 1}


def _read(path: Path) -> dict[str, Any]:
    return read_yaml(path) if path.is_file() else {}
