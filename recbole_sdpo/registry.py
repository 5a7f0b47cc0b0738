"""The places where RecBole looks things up, and what we put there."""

from __future__ import annotations

import importlib.util
import sys
import types
from logging import getLogger
from pathlib import Path
from typing import Any

import recbole.trainer
import yaml
from recbole.config import Config

from recbole_sdpo.data.prompts import NO_FULL_RANKING
from recbole_sdpo.objectives import OBJECTIVES
from recbole_sdpo.settings import Settings, check_unknown

MODEL = "SDPO-LLM"
PROPERTIES = Path(__file__).parent / "properties"

# Settings of RecBole that are dictionaries: a user who gives one key means to keep the others.
MERGED = ("eval_args", "train_neg_sample_args")

# What RecBole loads of a dataset that it does not know: no time, without which there is no order.
RECBOLE_LOADS = {"inter": ["user_id", "item_id"]}

# Keys that RecBole reads without naming them in its defaults.
RECBOLE_KEYS = {
    "model",
    "dataset",
    "config_files",
    "nproc",
    "world_size",
    "ip",
    "port",
    "group_offset",
    "wandb_project",
}

# Settings of RecBole's training loop that our two stages have for themselves.
WITHOUT_EFFECT = {"epochs", "learning_rate", "weight_decay"}


def register() -> None:
    """Make RecBole find the model, its trainer and its default settings under the name ``SDPO-LLM``."""
    from recbole_sdpo.model import SDPOLLM
    from recbole_sdpo.trainer import SDPOTrainer

    name = f"recbole.model.sequential_recommender.{MODEL.lower()}"
    module = types.ModuleType(name, SDPOLLM.__doc__)
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    setattr(module, MODEL, SDPOLLM)
    sys.modules[name] = module
    setattr(recbole.trainer, f"{MODEL}Trainer", SDPOTrainer)
    if Config._load_internal_config_dict is not _load_internal_config_dict:
        Config._load_internal_config_dict = _load_internal_config_dict


_recbole_load = Config._load_internal_config_dict


def _load_internal_config_dict(self: Config, model: str, model_class: type, dataset: str) -> None:
    """RecBole's defaults, and for our model ours: RecBole reads a model's defaults from its own folder only."""
    _recbole_load(self, model, model_class, dataset)
    if model == MODEL:
        add_defaults(self, default_settings(dataset) | _read(PROPERTIES / f"{MODEL}.yaml"))


def default_settings(dataset: str) -> dict[str, Any]:
    """What every model runs with under our command, and what belongs to the dataset."""
    return _read(PROPERTIES / "overall.yaml") | _read(PROPERTIES / "dataset" / f"{dataset}.yaml")


def add_defaults(config: Config, defaults: dict[str, Any]) -> None:
    """Put ``defaults`` under what the user gave, key by key in the settings that are dictionaries."""
    internal, given = config.internal_config_dict, config.external_config_dict
    internal |= defaults
    if internal["load_col"] == RECBOLE_LOADS:
        fields = [given.get(key, internal[key]) for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")]
        internal["load_col"] = {"inter": fields}
    for key in MERGED:
        if isinstance(given.get(key), dict) and isinstance(internal.get(key), dict):
            given[key] = internal[key] | given[key]


def _read(path: Path) -> dict[str, Any]:
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def check_settings(config: Config) -> Settings:
    """Our settings from a configuration, checked, together with what they ask of RecBole's.

    Raises:
        ValueError: a key that nobody reads, or a value that is wrong or does not go with another.
    """
    known = set(config.internal_config_dict) | {key for keys in config.parameters.values() for key in keys} | RECBOLE_KEYS
    ours = config["model"] == MODEL
    check_unknown(config.external_config_dict, known, only_near=not ours)
    settings = Settings.from_mapping(config.final_config_dict)
    if not ours:
        return settings
    for key in WITHOUT_EFFECT & set(config.external_config_dict):
        getLogger().warning(f"{key}={config[key]!r} has no effect on {MODEL}: its stages have sft_{key} and sdpo_{key}.")
    in_text = settings.prompt_style == "candidates"
    if OBJECTIVES[settings.objective].negatives or in_text:
        args = config["train_neg_sample_args"]
        number = args["sample_num"]
        if not isinstance(number, int) or number < 1:
            raise ValueError(
                f"train_neg_sample_args.sample_num={number!r}: objective={settings.objective!r} with prompt_style="
                f"{settings.prompt_style!r} needs 1 or more negatives; or set objective=sft and prompt_style=history."
            )
        if args["dynamic"]:
            raise ValueError(f"train_neg_sample_args.dynamic={args['dynamic']!r} is not there for {MODEL}; valid is False.")
        if in_text and number >= settings.prompt_candidates:
            raise ValueError(
                f"train_neg_sample_args.sample_num={number}: the negatives are among the {settings.prompt_candidates} candidates "
                f"of the prompt (prompt_candidates); valid is 1 to {settings.prompt_candidates - 1}."
            )
    if in_text and "full" in config["eval_args"]["mode"].values():
        raise ValueError(f"eval_args.mode={config['eval_args']['mode']}: {NO_FULL_RANKING}")
    return settings
