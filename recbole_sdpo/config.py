"""The configuration of one run: RecBole's, with our evaluation defaults under what the user
gave."""

from __future__ import annotations

import copy
import os
from logging import getLogger
from pathlib import Path
from typing import Any

import recbole
from recbole.config import Config
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import ModelType

from recbole_sdpo.checks.configuration import check_settings
from recbole_sdpo.checks.recbole_rules import MODEL_NAME
from recbole_sdpo.errors import UserError, meant
from recbole_sdpo.registry import add_defaults, default_settings
from recbole_sdpo.settings import MODEL, Settings, merged_parts

MODELS = "https://recbole.io/docs/user_guide/model_intro.html"


class RunConfig(Config):
    """RecBole's configuration with our evaluation defaults under it, whichever the model.

    Raises:
        UserError: an unknown or wrong setting of ours.
    """

    def _load_internal_config_dict(
        self, model: str, model_class: type[AbstractRecommender], dataset: str
    ) -> None:
        super()._load_internal_config_dict(model, model_class, dataset)
        if model == MODEL:
            return
        add_defaults(self, default_settings(dataset))
        loss = self.external_config_dict.get(
            "loss_type", self.internal_config_dict.get("loss_type")
        )
        if loss == "CE" and model_class.type == ModelType.SEQUENTIAL:
            # RecBole refuses such a model while its own default asks for negatives, which
            # cross-entropy has no use for.
            if self.external_config_dict.pop("train_neg_sample_args", None):
                getLogger().warning(
                    f"train_neg_sample_args has no use for {model}, whose loss is cross-entropy "
                    "over all items."
                )
            self.internal_config_dict["train_neg_sample_args"] = None

    def _get_model_and_dataset(self, model: str | None, dataset: str | None) -> tuple:
        for key, argument in (("model", model), ("dataset", dataset)):
            if argument is None and key not in self.external_config_dict:
                raise UserError(f"{key} must be given, as an argument or a setting.")
        model = self.external_config_dict["model"] if model is None else model
        if not isinstance(model, type):
            MODEL_NAME.check("model", model)
        try:
            return super()._get_model_and_dataset(model, dataset)
        except (ValueError, AttributeError, ModuleNotFoundError) as error:
            # RecBole looks for an unknown name among models whose libraries are not installed, and
            # stumbles over those.
            files = Path(recbole.__path__[0]).glob("properties/model/*.yaml")
            names = [MODEL, *sorted(file.stem for file in files)]
            if model in names:
                raise UserError(
                    f"model={model!r} cannot be loaded, although RecBole has it: {error}."
                ) from error
            raise UserError(
                f"model={model!r} must be {MODEL} or a model of RecBole, as listed at {MODELS}; "
                f"{meant(model, names, 'GRU4Rec is one.')}"
            ) from error

    def _merge_external_config_dict(self) -> None:
        """As RecBole's, but that who gives one part of a dictionary keeps those given before: in a
        file, then from Python, then on the command line.

        RecBole completes dictionaries in place; those of the caller stay as they are.
        """
        merged: dict[str, Any] = {}
        for given in (self.file_config_dict, self.variable_config_dict, self.cmd_config_dict):
            merged |= given | merged_parts(merged, given)
        self.external_config_dict = copy.deepcopy(merged)

    def _set_default_parameters(self) -> None:
        """As RecBole's, which passes over a ``data_path`` that is given for ml-100k."""
        super()._set_default_parameters()
        if data_path := self.external_config_dict.get("data_path"):
            self.final_config_dict["data_path"] = os.path.join(data_path, self.dataset)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings: Settings = check_settings(self)
