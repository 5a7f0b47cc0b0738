"""``run_recbole_sdpo.py``, which has no sub-commands, as RecBole's own script has none: it is a
run, unless ``--experiment`` or ``--settings`` says otherwise."""

from __future__ import annotations

import argparse
import sys

from recbole_sdpo.command import experiment, run, settings
from recbole_sdpo.command.options import once
from recbole_sdpo.errors import UserError
from recbole_sdpo.interrupt import endings
from recbole_sdpo.output import show
from recbole_sdpo.settings import table


@endings()
def main() -> None:
    """Parse the options of a run and of an experiment, and call the one that is meant."""
    parser = argparse.ArgumentParser(
        description="Train and evaluate a model on one split and one set of candidates.",
        epilog="Any setting of RecBole or of ours follows as --name=value. The program "
        "recbole-sdpo does the same by sub-commands, and recommends.",
        allow_abbrev=False,
    )
    run.add_options(once(parser))
    parser.add_argument("--settings", action="store_true", help=f"{settings.HELP}, and stop")
    parser.add_argument("--experiment", metavar="FILE", help=experiment.HELP)
    experiment.add_further_options(parser)
    args, rest = parser.parse_known_args()
    if args.settings:
        show(table())
    elif args.experiment:
        if args.model or args.dataset or args.config_files:
            raise UserError(
                "--experiment names models, dataset and settings in its file; leave out --model, "
                "--dataset and --config_files."
            )
        sys.exit(experiment.call(args, rest))
    else:
        if args.tune or args.output or args.jobs != 1:
            raise UserError("--tune, --output and --jobs go with --experiment.")
        run.call(args, rest)
