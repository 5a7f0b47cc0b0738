"""``recbole-sdpo experiment``: many runs from one YAML file, and a report."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from recbole_sdpo import compat
from recbole_sdpo.command.run import read_settings
from recbole_sdpo.errors import UserError
from recbole_sdpo.experiment.run import run_experiment
from recbole_sdpo.files import config_file, user_path
from recbole_sdpo.interrupt import as_given

HELP = "do the runs that a YAML file names, and write a report of tables and figures"

EXAMPLES = """\
  recbole-sdpo experiment configs/ml-100k/main.yaml                all that is not done yet
  recbole-sdpo experiment configs/ml-100k/main.yaml --jobs=2       two runs at once
  recbole-sdpo experiment my.yaml --tune                           first search, on validation
  recbole-sdpo experiment my.yaml --sft_epochs=1                   a setting for every run

Any setting of RecBole or of ours follows as --name=value, and holds for every run."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the file does not say."""
    parser.add_argument("experiment", metavar="FILE", help="such as configs/ml-100k/main.yaml")
    add_further_options(parser)


def add_further_options(parser: argparse.ArgumentParser) -> None:
    """Those beside the file."""
    parser.add_argument(
        "--output",
        help="folder of the report (default: saved/ and the file's place below configs/, or else "
        "below here)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs that go on at once, sharing the cores (default: 1)",
    )
    parser.add_argument(
        "--tune", action="store_true", help="first try the settings under tune of each run"
    )


def call(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Do the runs, with the settings in ``rest`` beside their own. 1 if a run failed."""
    settings = read_settings(args, rest)
    compat.check_launcher()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "an experiment starts its runs itself; call it with plain python, and --jobs for "
            "several at once."
        )
    if args.jobs < 1:
        raise UserError(f"--jobs={args.jobs} must be 1 or more.")
    own = {"model", "dataset", "config_files"} & settings.keys()
    if own:
        raise UserError(
            f"--{min(own)} cannot be given: the file names models, dataset and settings."
        )
    output = user_path(args.output) if args.output else _report_folder(args.experiment)
    command = shlex.join(as_given())
    with compat.no_arguments():  # these are not the settings of one run
        failures = run_experiment(
            config_file(args.experiment), output, settings, args.tune, args.jobs, command
        )
    return int(bool(failures))


def _report_folder(file: str) -> Path:
    """Another for each file below ``configs/`` or below here, as two may have one name."""
    path = Path(os.path.normpath(file))
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    above = path.parts[:-1]
    if "configs" in above:
        place = above[above.index("configs") + 1 :]
    else:
        place = () if path.is_absolute() or ".." in above else above
    return Path("saved", *place, path.stem)
