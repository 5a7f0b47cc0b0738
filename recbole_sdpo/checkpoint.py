"""What the files beside a policy say of it, wherever the folder comes from: they are data, and set nothing but what is listed here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_sdpo.errors import UserError
from recbole_sdpo.files import SUMS, check_seal, read_json
from recbole_sdpo.lm.backbone import ADAPTER_FILE, BackboneConfig
from recbole_sdpo.settings import Role, Settings, having
from recbole_sdpo.trainer.sdpo_trainer import DATA_FILE, POLICY_FILE

OF_THE_DATA: dict[str, type | tuple[type, ...]] = {
    "data_path": str,
    "encoding": str,
    "field_separator": str,
    "seq_separator": str,
    "USER_ID_FIELD": str,
    "ITEM_ID_FIELD": str,
    "TIME_FIELD": str,
    "LIST_SUFFIX": str,
    "load_col": dict,
    "unload_col": dict,
    "seq_len": dict,
    "benchmark_filename": list,
    "rm_dup_inter": str,
    "val_interval": dict,
    "filter_inter_by_user_or_item": bool,
    "user_inter_num_interval": str,
    "item_inter_num_interval": str,
    "MAX_ITEM_LIST_LENGTH": int,
}
"""The settings of RecBole that a checkpoint has from its data, with their types; all may be null but ``data_path``."""



@dataclass(frozen=True)
class Checkpoint:
    """A policy's folder, and how it was made.

    Attributes:
        folder: ``sft`` or ``sdpo`` of a run, or wherever it was moved.
        settings: of the policy; all others have their defaults.
        header: what opens its prompts.
        seed: of the random weights under an adapter, if there are such.
        dataset: a name.
        data: settings of RecBole, of :data:`OF_THE_DATA`.
        backbone: a folder, a file or a hub id.
    """

    folder: Path
    settings: Settings
    header: str
    seed: int
    dataset: str
    data: dict[str, Any]
    backbone: str

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Read what a run wrote; it may have been changed since, or be a stranger's.

        Raises:
            UserError: naming the file that is damaged, or what is wrong in it.
        """
        folder = _policy_folder(folder)
        if (folder / SUMS).is_file():
            check_seal(folder)
        else:
            getLogger().warning(f"checkpoint {str(folder)!r} has no {SUMS}, as older ones have none: whether it is damaged is not known.")
        if (folder / ADAPTER_FILE).is_file() and not (folder / "adapter_model.safetensors").is_file():
            raise UserError(f"checkpoint {str(folder)!r} has no adapter_model.safetensors; its weights must be in that file, not a pickle.")
        policy, data = folder / POLICY_FILE, folder / DATA_FILE
        made, given = read_json(policy), read_json(data)
        try:
            served = having(Role.SERVED) - having(Role.CALLER)
            settings = Settings.from_mapping({key: made[key] for key in served & set(made)})
        except UserError as error:
            raise UserError(f"{policy}: {error}") from error
        dataset = _take(given, "dataset", str, data)
        if not re.fullmatch(r"[^/\\\0-\x1f]{1,100}", dataset) or dataset in (".", ".."):
            raise UserError(f"{data}: dataset={dataset[:200]!r} must be a name, not a path.")
        wanted = _take(given, "settings", dict, data)
        known = {key: wanted[key] for key in OF_THE_DATA if key in wanted}
        for key in known:
            _take(known, key, OF_THE_DATA[key] if key == "data_path" else (OF_THE_DATA[key], type(None)), data)
        backbone = _take(given, "backbone", str, data)
        if not backbone or "\0" in backbone:
            raise UserError(f"{data}: backbone={backbone!r} must be a name or a path.")
        seed = _take({"seed": 0} | made, "seed", int, policy)
        return cls(folder, settings, _take(made, "header", str, policy), seed, dataset, known, backbone)

    def backbone_config(self, trust_remote_code: bool) -> BackboneConfig:
        """What to load, on the word of the caller."""
        flat = self.settings.to_flat() | {"backbone": self.backbone, "trust_remote_code": trust_remote_code}
        return BackboneConfig(**{f.name: flat[f.name] for f in fields(BackboneConfig)})


def _policy_folder(folder: Path) -> Path:
    places = [place for place in (folder / "sdpo", folder / "sft", folder) if (place / DATA_FILE).is_file()]
    if not places:
        raise UserError(f"checkpoint={str(folder)!r} holds no {DATA_FILE}; it must be the folder of a run, or 'sft' or 'sdpo' in it.")
    return places[0]


def _take(values: Mapping[str, Any], key: str, kind: type | tuple[type, ...], source: Path) -> Any:
    """The value under ``key``, if it is of one of the types ``kind``."""
    if key not in values:
        raise UserError(f"{source} has no {key!r}; it must be as a run wrote it.")
    value, kinds = values[key], kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("null" if each is type(None) else WORDS[each] for each in kinds)
        raise UserError(f"{source}: {key}={repr(value)[:200]} must be {names}.")
    return value


WORDS = {str: "text", int: "a whole number", bool: "true or false", dict: "a dictionary", list: "a list"}
