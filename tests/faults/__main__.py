"""Many trials of each kind, and a report of what went wrong, each with how to see it again.

python -m tests.faults
    the long version, which is make faults: all kinds, a fresh seed
python -m tests.faults --kinds kills crashes --trials 50
    fifty of each of two kinds
python -m tests.faults --only configurations:123 --seed 7 --keep /tmp/x
    one of them again; its files stay in /tmp/x
python -m tests.faults --tree ../other
    against the code of another folder
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults.judge import SORTS, Wrong
from tests.faults.kinds import KINDS
from tests.faults.trial import Trial
from tests.faults.warm import warm_up


@dataclass
class Verdict:
    """Of a trial.

    Attributes:
        sort: of being wrong, one of ``SORTS``; "harness", a fault of these tests; "right".
        what: what was tried.
        why: what was seen; of what is right, "result" or "sentence".
    """

    kind: str
    number: int
    sort: str
    what: str
    why: str
    seconds: float


def judge(
    work: Path, seed: int, kind: str, number: int, until: float, keep: bool
) -> Verdict | None:
    """Make one trial; None where there is no time left for it."""
    began = time.monotonic()
    if began > until:
        return None
    trial = Trial(work, seed, kind, number)
    trial.clean()
    trial.folder.mkdir(parents=True)
    try:
        why = KINDS[kind].attempt(trial) or "result"
        trial.check_marker()
        sort = "right"
    except Wrong as wrong:
        sort, why = wrong.sort, wrong.why
        if trial.marker.exists():
            sort = "code ran"
    except Exception:
        sort, why = "harness", traceback.format_exc()
    finally:
        if not keep:
            trial.clean()
    return Verdict(kind, number, sort, trial.what, why, round(time.monotonic() - began, 2))


def main() -> int:
    """Parse the command line, make the trials, print what went wrong; 1 if anything did."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=[*KINDS],
        metavar="KIND",
        help=f"of {', '.join(KINDS)} (default: all)",
    )
    parser.add_argument("--trials", type=int, help="of each kind (default: each kind's own number)")
    parser.add_argument(
        "--short", action="store_true", help="each kind's smaller number, which make test has"
    )
    parser.add_argument("--only", nargs="+", metavar="KIND:NUMBER", help="these trials alone")
    parser.add_argument("--seed", type=int, help="of all that is drawn (default: a fresh one)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="trials at once (default: one to each core)",
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no trial later than this"
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the report")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="work in this folder, and leave it"
    )
    parser.add_argument(
        "--tree",
        type=Path,
        default=Path.cwd(),
        help="the folder that holds the package recbole_sdpo (default: this one)",
    )
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    sys.path.insert(0, str(args.tree.resolve()))
    os.environ["PYTHONPATH"] = str(args.tree.resolve())
    work = (args.keep or Path(tempfile.mkdtemp(prefix="faults-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        _warm(work, seed)
        began = time.monotonic()
        verdicts = _all(
            work, seed, _chosen(args), args.jobs, began + 60 * args.minutes, bool(args.keep)
        )
        minutes = (time.monotonic() - began) / 60
    finally:
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)
    report = _report(verdicts, seed, minutes)
    print(report, flush=True)
    if args.output:
        found = {
            "seed": seed,
            "minutes": minutes,
            "verdicts": [asdict(verdict) for verdict in verdicts],
        }
        args.output.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return int(any(verdict.sort != "right" for verdict in verdicts))


def _warm(work: Path, seed: int) -> None:
    """Import all that runs need."""
    import torch

    import recbole_sdpo.command.program

    torch.set_num_threads(1)
    from tests.faults import toy
    from tests.faults.trial import from_python

    trial = Trial(work, seed, "warm-up", 0)
    backbone, data = trial.backbone, str(trial.data)
    trial.folder.mkdir(exist_ok=True)

    def some() -> None:
        for model, other in (
            ("SDPO-LLM", {"backbone": str(backbone)}),
            ("SDPO-LLM", {}),
            ("BPR", {}),
        ):
            from_python(model, "toy", toy.settings(model, data_path=data, **other))

    warm_up(trial.folder, some)
    print(
        f"recbole_sdpo of {Path(recbole_sdpo.__file__).parent}, seed {seed}, in {work}", flush=True
    )


def _chosen(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Kinds and numbers of trials, the kinds in turn."""
    if args.only:
        return [
            (kind, int(number)) for kind, _, number in (one.partition(":") for one in args.only)
        ]
    counts = {
        kind: args.trials or (KINDS[kind].SHORT if args.short else KINDS[kind].LONG)
        for kind in args.kinds
    }
    spread = [
        (number / count, kind, number)  # some kind has one, which takes as long as many
        for kind, count in counts.items()
        for number in range(count)
    ]
    return [(kind, number) for _, kind, number in sorted(spread)]


def _all(
    work: Path, seed: int, chosen: list[tuple[str, int]], jobs: int, until: float, keep: bool
) -> list[Verdict]:
    verdicts, shown = [], time.monotonic()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        pending = [
            pool.submit(judge, work, seed, kind, number, until, keep) for kind, number in chosen
        ]
        for future in as_completed(pending):
            if verdict := future.result():
                verdicts.append(verdict)
            if time.monotonic() > shown + 30:
                shown = time.monotonic()
                wrong = sum(verdict.sort != "right" for verdict in verdicts)
                print(f"{len(verdicts)} of {len(chosen)} trials, {wrong} wrong", flush=True)
    return sorted(verdicts, key=lambda verdict: (verdict.kind, verdict.number))


def _report(verdicts: list[Verdict], seed: int, minutes: float) -> str:
    lines = []
    for verdict in verdicts:
        if verdict.sort != "right":
            lines.append(
                f"{verdict.kind}:{verdict.number} {verdict.sort}: {verdict.what}\n    {verdict.why}"
            )
    lines.append("")
    for kind in KINDS:
        sorts = Counter(verdict.sort for verdict in verdicts if verdict.kind == kind)
        if sorts:
            wrong = ", ".join(
                f"{sorts[sort]} {sort}" for sort in (*SORTS, "harness") if sorts[sort]
            )
            results = sum(verdict.why == "result" for verdict in verdicts if verdict.kind == kind)
            right = f"{sorts['right']} right, {results} of them with a result"
            lines.append(f"{kind}: {sorts.total()} trials, {right}{wrong and '; ' + wrong}")
    again = f"python -m tests.faults --only KIND:NUMBER --seed {seed}"
    lines.append(f"{len(verdicts)} trials in {minutes:.1f} minutes; one of them again: {again}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
