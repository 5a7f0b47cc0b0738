"""``recbole-sdpo run``: train and evaluate one model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from recbole_sdpo.errors import UserError
from recbole_sdpo.files import config_file, user_path
from recbole_sdpo.quick_start import run
from recbole_sdpo.settings import MODEL
from recbole_sdpo.values import read_arguments, read_yaml

HELP = "train and evaluate a model on one split and one set of candidates"

EXAMPLES = """\
  recbole-sdpo run --dataset=ml-100k                     SDPO-LLM: SFT, then S-DPO
  recbole-sdpo run --model=SASRec --dataset=ml-100k      a baseline, on the same candidates
  recbole-sdpo run --dataset=shop --data_path=data --backbone=Qwen/Qwen3-0.6B
  recbole-sdpo run --dataset=ml-100k --resume=saved/SDPO-LLM-ml-100k-…   go on where it stopped

Any setting of RecBole or of ours follows as --name=value; recbole-sdpo settings lists ours."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What no setting says."""
    parser.add_argument(
        "--model",
        help="SDPO-LLM, or any model of RecBole, such as GRU4Rec (default: SDPO-LLM)",
    )
    parser.add_argument(
        "--dataset",
        help="name of a dataset of atomic files (default: ml-100k, which RecBole brings)",
    )
    parser.add_argument(
        "--config_files",
        help="YAML files, separated by blanks; a later one overrides an earlier one",
    )


def call(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Run the model. RecBole reads the settings in ``rest`` itself."""
    read_settings(args, rest)
    files = _files(args.config_files or "")
    in_files: dict[str, Any] = {}
    for file in files:
        in_files |= read_yaml(config_file(file), f"config_files={file!r}")
    run(
        args.model or in_files.get("model", MODEL),
        args.dataset or in_files.get("dataset", "ml-100k"),
        files,
    )


def _files(text: str) -> list[str]:
    """Files, separated by blanks, or the one whose path has some."""
    return [text] if os.path.isfile(user_path(text)) else text.split()


def read_settings(args: argparse.Namespace, rest: Sequence[str]) -> dict[str, Any]:
    """The settings among the arguments.

    Raises:
        UserError: an argument is no setting, or an option is blank.
    """
    settings, others = read_arguments(rest)
    if others:
        raise UserError(
            f"cannot read {others[0]!r}; settings are given as --name=value, without blanks."
        )
    refuse_blank(args)
    return settings


def refuse_blank(args: argparse.Namespace) -> None:
    """Such as a variable of a shell that is not set.

    Raises:
        UserError: an option is blank.
    """
    for name, value in vars(args).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.strip():
                raise UserError(f"--{name}={text} is blank; give a name, or leave it out.")
