"""``recbole-sdpo recommend``: the top items of a trained policy, as a table or JSON, or those of
all users as a file."""

from __future__ import annotations

import argparse
import json
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence

import torch
import transformers

from recbole_sdpo import compat
from recbole_sdpo.command.run import refuse_blank
from recbole_sdpo.errors import UserError
from recbole_sdpo.files import user_path
from recbole_sdpo.output import show
from recbole_sdpo.recommend import Recommender
from recbole_sdpo.recommend_all import check_output, recommend_all
from recbole_sdpo.report.table import markdown_table, markdown_text

TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
"""Kinds of Unicode that change the direction of writing."""

HELP = (
    "print the items that a trained policy recommends to a user or after a history, or write "
    "those of all users to a file"
)

EXAMPLES = """\
  recbole-sdpo recommend --checkpoint saved/SDPO-LLM-ml-100k-… --user 196
  recbole-sdpo recommend --checkpoint RUN --history "Star Wars; Alien" -k 5 --exclude_history
  recbole-sdpo recommend --checkpoint RUN --user 196 --format json
  recbole-sdpo recommend --checkpoint RUN --users all -k 20 --output best.csv"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, and for whom."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        nargs="+",  # what a shell makes of saved/SDPO-LLM-*, so that it can be named
        metavar="DIR",
        help="folder of a run, or 'sft' or 'sdpo' in it",
    )
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", help="a user's id in the data")
    who.add_argument(
        "--history",
        action="append",
        help="titles, oldest first, separated by ';'; or the option once for each title",
    )
    who.add_argument(
        "--users",
        help="all, or a file with a user's id on each line: write all to --output",
    )
    parser.add_argument("--output", metavar="FILE", help="a new .csv or .parquet file, for --users")
    parser.add_argument("-k", "--k", type=int, default=10, help="how many (default: 10)")
    parser.add_argument(
        "--exclude_history",
        action="store_true",
        help="recommend nothing that stands in the history",
    )
    parser.add_argument("--format", choices=("table", "json"), help="default: table")
    parser.add_argument("--data_path", help="where the data are now, if they have moved")
    parser.add_argument("--device", help="such as cpu or cuda (default: a GPU if there is one)")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run code that comes with the backbone's files",
    )


def call(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Load the policy, and print its best items.

    Raises:
        UserError: the checkpoint, the user or the history cannot be used.
    """
    refuse_blank(args)
    compat.quiet_warnings()
    transformers.utils.logging.disable_progress_bar()
    folder, *others = args.checkpoint
    if others:
        raise UserError(
            f"--checkpoint names {len(args.checkpoint)} folders, {' and '.join(args.checkpoint)}; "
            "give one."
        )
    compat.check_launcher()
    process, processes, place = (
        int(os.environ.get(key, default))
        for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    _check_together(args, processes)
    device = args.device
    if device is None and processes > 1 and torch.cuda.is_available():
        device = f"cuda:{place}"
    output = user_path(args.output) if args.users else None
    if output and not process:
        check_output(output)  # before the model is loaded
    recommender = Recommender.load(folder, args.data_path, device, args.trust_remote_code)
    if output:
        users = list(recommender.users) if args.users == "all" else _lines(args.users)
        recommend_all(
            recommender,
            output,
            users,
            args.k,
            args.exclude_history,
            (process, processes),
            show_progress=not process,
        )
        if not process:
            show(f"{len(users):,} users, {args.k} titles each: {output}")
        return
    history = args.history
    if history and len(history) == 1 and history[0] not in recommender:
        history = [title for title in history[0].split(";") if title.strip()]
    best = recommender.recommend(args.user, history, args.k, args.exclude_history)
    if args.format == "json":
        show(
            json.dumps(
                best.to_dict("records"), indent=2, ensure_ascii=not _is_utf8(), allow_nan=False
            )
        )
    else:
        rows = [
            [rank, _cell(item), _cell(title), score]
            for rank, (item, title, score) in enumerate(best.itertuples(index=False), 1)
        ]
        show(markdown_table(["", *best.columns], rows))


def _check_together(args: argparse.Namespace, processes: int) -> None:
    """Options that go together, and those that do not.

    Raises:
        UserError: naming them.
    """
    if (args.users is None) != (args.output is None):
        raise UserError(
            "--users and --output go together: the items of all users are written to a file."
        )
    if args.users and args.format:
        raise UserError(f"--format={args.format} is for one user; --output's name has the format.")
    if processes > 1 and not args.users:
        raise UserError(f"A launch of {processes} processes is for --users; start it with one.")


def _lines(file: str) -> list[str]:
    """The ids in ``file``, one on each line.

    Raises:
        UserError: one comes twice, or there is no such file, or it is no text.
    """
    if not os.path.isfile(user_path(file)):
        raise UserError(f"--users={file!r} must be all, or a file with a user's id on each line.")
    try:
        text = user_path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--users={file!r} must be text in UTF-8: {error}.") from error
    users = [line.strip() for line in text.splitlines() if line.strip()]
    twice = sorted(user for user, times in Counter(users).items() if times > 1)
    if twice:
        raise UserError(f"--users={file!r} has {twice[0]!r} more than once; give each user once.")
    return users


def _cell(text: str) -> str:
    """``text`` in a Markdown table, and in a terminal, whatever is in it."""
    safe = (ascii(char)[1:-1] if _moves(char) else char for char in text)
    return markdown_text(" ".join("".join(safe).split()))


def _moves(char: str) -> bool:
    """Does it move the cursor, or turn the direction of what follows?"""
    return unicodedata.category(char) == "Cc" or unicodedata.bidirectional(char) in TURNS


def _is_utf8() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
