"""What a run's result depends on, as one hash: a run of the same identity need not be run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from pathlib import Path

import torch

import recbole_sdpo
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.prompts import template_file
from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.backbone import BackboneConfig, weights_source
from recbole_sdpo.quick_start import package_versions
from recbole_sdpo.settings import MODEL, OF_EVERY_MODEL, names

# Settings that say where and how to run, not what comes out; of files the contents count, and not where they lie.
WITHOUT_INFLUENCE = {
    "cache_dir",
    "checkpoint_dir",
    "config_files",
    "data_path",
    "gpu_id",
    "log_wandb",
    "resume",
    "run_dir",
    "save_minutes",
    "saved",
    "sft_checkpoint",
    "show_progress",
    "state",
    "verbose",
    "wandb_project",
}

# Parts of the package that only look at results, or decide what to run, or whose outcome is in the settings already.
ONLOOKERS = {"experiment", "report", "command.py", "__main__.py", "significance.py", "SDPO-LLM.yaml"}

# Parts that models of RecBole have nothing to do with.
OF_SDPO_LLM = {"settings.py", "lm", "model", "trainer", "objectives.py", "prompts.py", "prompts", "examples.py"}


def identity(config: RunConfig, begun_from: str | None) -> str:
    """The identity of the run that ``config`` describes, 16 hexadecimal digits.

    Args:
        begun_from: the identity of the run whose SFT checkpoint it begins from, which counts in place of that file.

    Raises:
        UserError: the dataset has no files.
    """
    ours, own, files = config["model"] == MODEL, config.settings, {"pre_model_path": config["pre_model_path"]}
    if ours:
        chosen = BackboneConfig(**{f.name: getattr(own, f.name) for f in fields(BackboneConfig)})
        backbone = chosen.resolve(torch.device(config["device"])).backbone
        own = own.suited_to(backbone)
        files = {"backbone": backbone != "scratch" and weights_source(backbone), "prompt_templates": template_file(own.prompt_templates)}
        files |= {} if begun_from else {"sft_checkpoint": own.sft_checkpoint}
    settings = config.final_config_dict | own.to_flat()
    # RecBole's loaders draw a baseline's negatives in their worker processes; ours are drawn before.
    idle = WITHOUT_INFLUENCE | ({"worker"} if ours else set(names()) - OF_EVERY_MODEL)
    parts = {
        "model": config["model"],
        "settings": {key: str(value) for key, value in sorted(settings.items()) if key not in idle},
        "files": {key: _content(Path(place).expanduser()) for key, place in files.items() if place},
        "begun_from": begun_from,
        "data": _data(Path(config["data_path"]), config["dataset"], config["additional_feat_suffix"] or ()),
        "code": sources(frozenset(ONLOOKERS if ours else ONLOOKERS | OF_SDPO_LLM)),
        "versions": package_versions(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _data(folder: Path, name: str, more: Iterable[str]) -> dict[str, str]:
    ends = {".inter", ".item", ".user", ".kg", ".link", ".net", *(f".{end}" for end in more)}
    files = sorted(file for file in folder.glob(f"{name}.*") if file.suffix in ends)
    if not files:
        raise UserError(f"dataset={name!r}: {folder} holds no atomic files, such as {name}.inter; give the folder above it as data_path.")
    return {file.name: _content(file) for file in files}


@cache
def _content(path: Path) -> str | None:
    """sha256 of a file, or of the files in a folder; None where there is none, as for a backbone of the hub."""
    if path.is_file():
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while part := stream.read(1 << 20):
                digest.update(part)
        return digest.hexdigest()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return _digest("\n".join(f"{file.relative_to(path)} {_content(file)}" for file in files).encode())
    return None


def sources(without: frozenset[str] = frozenset()) -> str:
    """sha256 of this package's sources, but for some files and folders, as they are on the disk now."""
    root = Path(recbole_sdpo.__path__[0])
    every = sorted(file for file in root.rglob("*") if file.suffix in {".py", ".yaml"})
    files = [file for file in every if not without & set(file.relative_to(root).parts)]
    return _digest("\n".join(f"{file.relative_to(root)} {_digest(file.read_bytes())}" for file in files).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
