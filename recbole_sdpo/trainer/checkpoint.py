"""Checkpoints: a policy's folder, and beside its weights how it was made and from which data.

A run writes them and loads them again. Whoever serves one reads it, wherever the folder comes from:
its files are data, and set nothing but what is listed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any

import recbole
from accelerate import PartialState
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from recbole_sdpo.data.candidates import candidates_seed
from recbole_sdpo.errors import UserError
from recbole_sdpo.files import (
    SUMS,
    check_seal,
    read_json,
    read_record,
    seal,
    user_path,
    whole_folder,
    write_text,
)
from recbole_sdpo.lm.attention import FLEX
from recbole_sdpo.lm.backbone import SMOLLM2
from recbole_sdpo.lm.parts import gathered, is_parted
from recbole_sdpo.lm.policy import ADAPTER_FILE, restore_policy, save_backbone
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.result import RESULT_FILE, read_result
from recbole_sdpo.rules import whole
from recbole_sdpo.settings import BackboneSettings, Role, Settings, having
from recbole_sdpo.trainer.state import STATE, STATE_FILE, holds_state
from recbole_sdpo.values import KINDS, check_values, is_a, shown

POLICY_FILE, DATA_FILE = "settings.json", "data.json"
"""How the policy was made, and the settings under which its data were loaded."""

OF_THE_DATA: dict[str, type] = {
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
"""The settings of RecBole that a checkpoint has from its data, with their types.

All may be null but ``data_path``.
"""


def save_checkpoint(folder: Path, model: SDPOLLM) -> None:
    """Write the policy of ``model`` and what it takes to load it again, whole or not at all.

    A process that has a part of the model gives it to the first, which writes.

    Raises:
        OSError: the disk is full, …
    """
    main, weights = PartialState().is_main_process, None
    if is_parted(model):
        weights = gathered(model.lm.model.state_dict().items(), main)
    if not main:
        return
    settings = model.settings.to_flat() | _made_with(model)
    with whole_folder(folder) as part:
        save_backbone(model.lm, part, weights)
        write_text(part / POLICY_FILE, json.dumps(settings, indent=2))
        write_text(part / DATA_FILE, json.dumps(_data(model), indent=2))
        seal(part)


def load_checkpoint(folder: Path, model: SDPOLLM) -> None:
    """Load a policy into ``model``, if it was made as the one there.

    Raises:
        UserError: it was made otherwise, is damaged, or is none.
    """
    check_whole(folder)
    made = _said(folder, POLICY_FILE)
    for key, value in _made_with(model).items():
        if key == "candidates_seed" and made.get(key) is None:
            continue  # an older one does not say which items were held out
        if made.get(key, value) != value:
            raise UserError(
                f"checkpoint {str(folder)!r} was made with {key}={made[key]!r}, and this run has "
                f"{value!r}; use the settings it was made with."
            )
    restore_policy(model.lm, folder, new_titles=model.backbone.name != "scratch")
    model.trained_on |= _trained_on(folder)


def _said(folder: Path, name: str) -> dict[str, Any]:
    """What a file of a checkpoint says; nothing where a stranger's has none."""
    return read_json(folder / name) if (folder / name).is_file() else {}


def _trained_on(folder: Path) -> set[str]:
    """Digests of the targets that a checkpoint's weights have met; none if it is older than they
    are."""
    digests = _said(folder, DATA_FILE).get("trained_on", [])
    return {digests} if isinstance(digests, str) else set(digests)


def load_sft(place: Path, model: SDPOLLM) -> None:
    """:func:`load_checkpoint` of what ``sft_checkpoint`` names; warns of targets that this run does
    not train on, and of settings of SFT that come too late.

    Raises:
        UserError: as there.
    """
    folder, own_targets = sft_folder(place), set(model.trained_on)
    load_checkpoint(folder, model)
    warn_of_unfinished(folder)
    policy = _said(folder, POLICY_FILE)
    if model.trained_on - own_targets:
        getLogger().warning(
            f"sft_checkpoint={str(place)!r} was trained on other events than this run trains on: "
            "if targets of its validation or test are among them, all numbers are too good."
        )
    given, own = model.config.external_config_dict, model.settings.to_flat()
    late = {
        key: policy[key]
        for key in sorted(own.keys() & given.keys() & policy.keys())
        if key.startswith("sft_") and key != "sft_checkpoint" and own[key] != policy[key]
    }
    if late:
        getLogger().warning(
            f"{', '.join(f'{key}={own[key]!r}' for key in late)} has no effect with "
            f"sft_checkpoint, whose SFT had {', '.join(map(repr, late.values()))}."
        )


def warn_of_unfinished(folder: Path) -> None:
    """Say where a checkpoint is of a stage that was interrupted, so that its weights are no more
    than the best so far."""
    run_dir = folder.parent
    if not holds_state(run_dir) or (run_dir / RESULT_FILE).is_file():
        return
    state = read_record(run_dir / STATE / STATE_FILE)  # damaged, it says nothing
    if state is None or folder.name not in state.get("reports", {}):
        getLogger().warning(
            f"checkpoint {str(folder)!r} is of a run that was interrupted: these are its best "
            f"weights so far. To train on, give resume={str(run_dir)!r}."
        )


def sft_folder(place: Path) -> Path:
    """The checkpoint that ``sft_checkpoint`` means: of a run's folder that of its SFT."""
    return place / "sft" if (place / "sft").is_dir() else place


def check_whole(folder: Path) -> None:
    """No run need have written ``folder``; where one has, all of it must be as it was, if it is not
    older than seals.

    Raises:
        UserError: it is not.
    """
    if (folder / SUMS).is_file():
        check_seal(folder)
    elif (folder / POLICY_FILE).is_file():
        getLogger().warning(
            f"checkpoint {str(folder)!r} has no {SUMS}, as older ones have none: whether it is "
            "damaged is not known."
        )


def _made_with(model: SDPOLLM) -> dict[str, Any]:
    """What a policy must share with a checkpoint that is loaded into it, as JSON has it.

    Its tokenizer and the shapes of its weights speak for themselves.
    """
    flat, backbone = model.settings.to_flat(), model.backbone
    flat |= {
        "backbone": backbone.name,
        "item_tokens": backbone.item_tokens,
        "peft": backbone.peft,
    }
    adapter = having(Role.ADAPTER) if backbone.peft == "lora" else frozenset()
    settings = {key: flat[key] for key in sorted(having(Role.POLICY) | adapter)}
    if backbone.name == "scratch":
        settings["scratch_heads"] = backbone.scratch_heads  # which no weight's shape tells
        if adapter:
            settings["seed"] = model.seed  # of the random weights under it
    if model.settings.held_out_items:
        settings["candidates_seed"] = candidates_seed(model.config)  # which drew them
    # of a template that may be elsewhere, or another, later
    header, *texts = model.units.pieces
    return json.loads(json.dumps(settings | {"header": header, "texts": texts}))


def _data(model: SDPOLLM) -> dict[str, Any]:
    """What it takes to load the data and the backbone again, wherever that is done, and which
    targets were trained on."""
    config, backbone = model.config, model.backbone
    without = having(Role.OF_THIS_RUN)
    given = {key: item for key, item in config.external_config_dict.items() if key not in without}
    data, place = Path(config["data_path"]).resolve(), user_path(backbone.name)
    known = backbone.name in ("scratch", SMOLLM2)  # whatever folder has such a name
    if Path(recbole.__path__[0]).resolve() not in data.parents:
        given["data_path"] = str(data.parent)
    else:  # of which every copy of RecBole has one
        given.pop("data_path", None)
    return {
        "dataset": config["dataset"],
        "backbone": str(place.resolve()) if place.exists() and not known else backbone.name,
        "settings": json.loads(json.dumps(given, default=str)),
        "trained_on": sorted(model.trained_on),
    }


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
        check_whole(folder)
        warn_of_unfinished(folder)
        adapted = (folder / ADAPTER_FILE).is_file()
        if adapted and not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            raise UserError(
                f"checkpoint {str(folder)!r} has no {SAFETENSORS_WEIGHTS_NAME}; its weights must "
                "be in that file, not a pickle."
            )
        policy, data = folder / POLICY_FILE, folder / DATA_FILE
        made, given = (check_values(read_json(file), f"{file}: ") for file in (policy, data))
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
            _take(
                known,
                key,
                OF_THE_DATA[key] if key == "data_path" else (OF_THE_DATA[key], type(None)),
                data,
            )
        backbone = _take(given, "backbone", str, data)
        if not backbone or "\0" in backbone:
            raise UserError(f"{data}: backbone={backbone!r} must be a name or a path.")
        seed = made.get("seed", 0)
        whole(0, 2**32 - 1).check(f"{policy}: seed", seed)
        return cls(
            folder, settings, _take(made, "header", str, policy), seed, dataset, known, backbone
        )

    def chosen(self, trust_remote_code: bool) -> BackboneSettings:
        """What to load, on the word of the caller; how it was made to train fast does not count."""
        backbone = self.settings.backbone
        return replace(
            backbone,
            name=self.backbone,
            trust_remote_code=trust_remote_code,
            attention="auto" if backbone.attention == FLEX else backbone.attention,
            compile=False,
            gradient_checkpointing=False,
        )


def _policy_folder(folder: Path) -> Path:
    places = [
        place
        for place in (folder / "sdpo", folder / "sft", folder)
        if (place / DATA_FILE).is_file()
    ]
    if not places and (folder / RESULT_FILE).is_file():
        model = read_result(folder)["model"]
        raise UserError(
            f"checkpoint={str(folder)!r} is a run of {model}; of RecBole's models none can be "
            "served, only SDPO-LLM."
        )
    if not places:
        raise UserError(
            f"checkpoint={str(folder)!r} holds no {DATA_FILE}; it must be the folder of a run, or "
            "'sft' or 'sdpo' in it."
        )
    return places[0]


def _take(values: Mapping[str, Any], key: str, kind: type | tuple[type, ...], source: Path) -> Any:
    """The value under ``key``, if it is of one of the types ``kind``."""
    if key not in values:
        raise UserError(f"{source} has no {key!r}; it must be as a run wrote it.")
    if not is_a(value := values[key], kind):
        names = " or ".join(KINDS[each] for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{source}: {key}={shown(value)} must be {names}.")
    return value
