"""What a run's result depends on, as one hash: a run of the same identity need not be run again."""

from __future__ import annotations

import hashlib
import json

from recbole_sdpo.checks.configuration import keys_of_recbole
from recbole_sdpo.config import RunConfig
from recbole_sdpo.inputs import Inputs
from recbole_sdpo.lm.backbone import resolved
from recbole_sdpo.settings import MODEL, SETTINGS, Role, having


def identity(config: RunConfig, inputs: Inputs, begun_from: str | None) -> str:
    """The identity of the run that ``config`` describes, 16 hexadecimal digits.

    Args:
        inputs: what it reads; of files the contents count, and not where they lie.
        begun_from: the identity of the run whose SFT checkpoint it begins from, which counts in
            place of that file.
    """
    ours, own = config["model"] == MODEL, config.settings
    if ours:
        own = own.suited_to(resolved(own.backbone, config["device"]))
    theirs = keys_of_recbole(config)
    if not ours and config["transform"] == "reorder_itemseq":  # which reads a beta, too
        theirs |= {"beta"}
    settings = config.final_config_dict | {
        key: value for key, value in own.to_flat().items() if key not in theirs
    }
    # RecBole's loaders draw a baseline's negatives in their worker processes; ours come before.
    others = {"worker"} if ours else SETTINGS.keys() - having(Role.EVERY_MODEL) - theirs
    idle = having(Role.IDLE) | others
    parts = {
        "model": config["model"],
        "settings": {key: str(value) for key, value in sorted(settings.items()) if key not in idle},
        "inputs": inputs.digests,
        "begun_from": begun_from,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
