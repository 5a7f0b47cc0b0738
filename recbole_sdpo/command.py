"""The command line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from recbole_sdpo import compat
from recbole_sdpo.errors import UserError
from recbole_sdpo.experiment.run import run_experiment
from recbole_sdpo.files import config_file
from recbole_sdpo.interrupt import endings
from recbole_sdpo.quick_start import run
from recbole_sdpo.settings import MODEL, table
from recbole_sdpo.values import read_arguments


@endings()
def main() -> None:
    """Parse ``--model``, ``--dataset`` and ``--config_files``; every other ``--name=value`` is a
    setting, as in RecBole."""
    parser = argparse.ArgumentParser(
        description="Train and evaluate a model on one split and one set of candidates.",
        epilog="Any setting of RecBole or of ours follows as --name=value; recbole-sdpo "
        "--settings lists ours.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        default=MODEL,
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
    parser.add_argument(
        "--experiment",
        help="a YAML file of many runs, such as configs/ml-100k/compare.yaml: run them, write a "
        "report",
    )
    parser.add_argument(
        "--output",
        help="folder of an experiment's report (default: saved/ and its place below configs/, or "
        "its name)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="with --experiment: runs that go on at once, sharing the cores (default: 1)",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="with --experiment: first try the settings under tune of each run",
    )
    parser.add_argument(
        "--settings", action="store_true", help="print our settings with their defaults, and stop"
    )
    args, rest = parser.parse_known_args()
    if args.settings:
        print(table())
        return
    try:
        settings, others = read_arguments(rest)
        if others:
            raise UserError(
                f"cannot read {others[0]!r}; settings are given as --name=value, without blanks."
            )
        for name in ("dataset", "config_files", "experiment", "output"):
            if getattr(args, name) is not None and not getattr(args, name).strip():
                raise UserError(
                    f"--{name}={getattr(args, name)} is blank; give a name, or leave it out."
                )
        if args.experiment:
            sys.exit(_experiment(args, settings))
        if args.tune or args.output or args.jobs != 1:
            raise UserError("--tune, --output and --jobs go with --experiment.")
        run(args.model, args.dataset or "ml-100k", (args.config_files or "").split())
    except UserError as error:
        sys.exit(f"error: {error}")


def _experiment(args: argparse.Namespace, settings: dict[str, Any]) -> int:
    """Run an experiment, its runs with ``settings`` beside their own. 1 if a run failed."""
    given = shlex.join(["python", *sys.argv])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "--experiment starts its runs itself; call it with plain python, and --jobs for "
            "several at once."
        )
    if args.jobs < 1:
        raise UserError(f"--jobs={args.jobs} must be 1 or more.")
    if args.model != MODEL or args.dataset or args.config_files:
        raise UserError(
            "--experiment names models, dataset and settings in its file; leave out --model, "
            "--dataset and --config_files."
        )
    below = Path(args.experiment).with_suffix("").parts
    place = below[below.index("configs") + 1 :] if "configs" in below else below[-1:]
    output = Path(args.output or Path("saved", *place))
    with compat.no_arguments():  # these are not the settings of one run
        failures = run_experiment(
            config_file(args.experiment), output, settings, args.tune, args.jobs, given
        )
    return int(bool(failures))
