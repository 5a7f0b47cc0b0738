"""The command line."""

from __future__ import annotations

import argparse
import sys

import yaml

from recbole_sdpo.quick_start import run
from recbole_sdpo.settings import table


def main() -> None:
    """Parse ``--model``, ``--dataset`` and ``--config_files``; every other ``--name=value`` is a setting, as in RecBole."""
    parser = argparse.ArgumentParser(
        description="Train and evaluate a model on one split and one set of candidates.",
        epilog="Any setting of RecBole or of ours follows as --name=value; recbole-sdpo --settings lists ours.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="SDPO-LLM", help="SDPO-LLM, or any model of RecBole, such as GRU4Rec (default: SDPO-LLM)")
    parser.add_argument(
        "--dataset",
        default="ml-100k",
        help="name of a dataset of atomic files (default: ml-100k, which RecBole brings)",
    )
    parser.add_argument("--config_files", default="", help="YAML files, separated by blanks; a later one overrides an earlier one")
    parser.add_argument("--settings", action="store_true", help="print our settings with their defaults, and stop")
    args, rest = parser.parse_known_args()
    if args.settings:
        print(table())
        return
    for argument in rest:
        if not argument.startswith("--") or argument.count("=") != 1:
            sys.exit(
                f"error: cannot read {argument!r}; settings are given as --name=value, without blanks, "
                "and a value that holds '=' in a YAML file."
            )
    try:
        run(args.model, args.dataset, args.config_files.split())
    except (ValueError, NotImplementedError, SyntaxError, FileNotFoundError, FloatingPointError, yaml.YAMLError) as error:
        sys.exit(f"error: {error}")
