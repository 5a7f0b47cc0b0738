"""``recbole-sdpo``, and ``python -m recbole_sdpo``: a sub-command, then what it takes."""

from __future__ import annotations

import argparse
import sys

from recbole_sdpo.command import audit, experiment, importing, recommend, run, settings
from recbole_sdpo.command.options import once
from recbole_sdpo.interrupt import endings
from recbole_sdpo.version import __version__

COMMANDS = {
    "run": run,
    "experiment": experiment,
    "recommend": recommend,
    "import": importing,
    "audit": audit,
    "settings": settings,
}
"""Each module has ``HELP``, ``EXAMPLES``, ``add_options(parser)`` and ``call(args, rest)``; the
rest of the command line are settings."""

WITH_SETTINGS = {"run", "experiment", "audit"}


@endings()
def main() -> int | None:
    """Call the sub-command that the command line names; its exit code."""
    parser = argparse.ArgumentParser(
        prog="recbole-sdpo",
        description="A language model as a recommender in RecBole: SFT, then S-DPO.",
        epilog="recbole-sdpo COMMAND --help shows what a command takes, and examples.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        more = " [--SETTING=VALUE ...]" if name in WITH_SETTINGS else ""
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=f"{module.HELP[0].upper()}{module.HELP[1:]}.",
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_options(once(command))
        command.usage = command.format_usage().removeprefix("usage: ").rstrip() + more
    if sys.argv[1:2] and sys.argv[1].startswith(("--model", "--dataset", "--config_files")):
        parser.error(f"a command comes first, as in: recbole-sdpo run {sys.argv[1]}")
    args, rest = parser.parse_known_args()
    if rest and args.command not in WITH_SETTINGS:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(rest)}")
    return COMMANDS[args.command].call(args, rest)
