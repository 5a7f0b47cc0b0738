"""What is true of a run, computed slowly and by other means than the package's."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

from tests.faults import toy
from tests.faults.judge import Wrong
from tests.faults.trial import result_of

OF_RANK = {
    "hit": lambda rank, k: float(rank <= k),
    "recall": lambda rank, k: float(rank <= k),
    "ndcg": lambda rank, k: 1 / math.log2(rank + 1) if rank <= k else 0.0,
    "mrr": lambda rank, k: 1 / rank if rank <= k else 0.0,
    "map": lambda rank, k: 1 / rank if rank <= k else 0.0,
    "precision": lambda rank, k: (rank <= k) / k,
}
"""Metrics of one target at its rank."""


def last_items(events: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """Of each user the item of the latest event; of equal times, of the last row."""
    latest: dict[str, tuple[Decimal, str]] = {}
    for user, item, time in events:
        if user not in latest or Decimal(time) >= latest[user][0]:
            latest[user] = (Decimal(time), item)
    return {user: item for user, (_, item) in latest.items()}


def ranks(run_dir: Path) -> list[dict[str, str]]:
    """The rows of ``ranks.csv``."""
    with (run_dir / "ranks.csv").open(encoding="utf-8", newline="") as stream:
        return [*csv.DictReader(stream)]


def check_metrics(run_dir: Path) -> None:
    """The metrics of ``result.json`` are those of the ranks; only where each user has one target.

    Raises:
        Wrong: a metric or a rank is not what it must be.
    """
    result = result_of(run_dir)
    rows, digits = ranks(run_dir), result["settings"]["metric_decimal_place"]
    by_part = defaultdict(list)
    for row in rows:
        by_part[row["stage"], row["candidates"]].append(row)
    for stage, report in result["stages"].items():
        for mode, of_mode in report["candidates"].items():
            part = by_part[stage, mode]
            users = [row["user"] for row in part]
            if len(set(users)) < len(users):
                return
            sampled = mode.removeprefix("uni").removeprefix("pop")
            most = int(sampled) + 1 if sampled.isdecimal() else math.inf
            for row in part:
                if not 1 <= int(row["rank"]) <= most:
                    raise Wrong(
                        "wrong result", f"rank {row['rank']} of user {row['user']} among {mode}"
                    )
            for metric, value in of_mode["test"].items():
                name, _, k = metric.partition("@")
                if name not in OF_RANK or not part:
                    continue
                mean = sum(OF_RANK[name](int(row["rank"]), int(k)) for row in part) / len(part)
                if not math.isclose(mean, value, abs_tol=0.51 * 10**-digits):
                    raise Wrong(
                        "wrong result",
                        f"{stage} {mode} {metric} is {value}, and {mean} of ranks.csv",
                    )
    last = [*result["stages"].values()][-1]["test"]
    if result["test_result"] != last:
        raise Wrong(
            "wrong result",
            f"test_result {result['test_result']} is not that of the last stage, {last}",
        )


def check_targets(run_dir: Path, targets: dict[str, str]) -> None:
    """Each user is tested on the item of ``targets``, in each stage and on each candidate set.

    Raises:
        Wrong: on another one, or not at all.
    """
    by_part = defaultdict(dict)
    for row in ranks(run_dir):
        by_part[row["stage"], row["candidates"]][row["user"]] = row["item"]
    for part, items in by_part.items():
        other = [user for user in targets if items.get(user) != targets[user]] + [
            user for user in items if user not in targets
        ]
        if other:
            user = other[0]
            raise Wrong(
                "wrong result",
                f"{len(other)} of {len(targets)} users in {part} are tested on another item, "
                f"such as {user!r} on "
                f"{items.get(user)!r}, whose last is {targets.get(user)!r}",
            )


def toy_targets() -> dict[str, str]:
    """The targets of the toy dataset, split by leaving one out."""
    return last_items(toy.rows())


def remains(run_dir: Path) -> dict[str, Any]:
    """What two runs of one seed and settings leave alike: bits and numbers, not times."""
    result = result_of(run_dir)
    stages = {
        name: {
            key: value for key, value in stage.items() if key not in ("wall_s", "train_s", "tokens")
        }
        for name, stage in result["stages"].items()
    }
    facts = {
        "stages": stages,
        **{
            key: result[key]
            for key in ("test_result", "popularity", "candidates_sha256", "training_targets")
        },
    }
    found: dict[str, Any] = {
        f"result.json {key}": json.dumps(value, sort_keys=True) for key, value in facts.items()
    }
    for file in run_dir.rglob("*"):
        name = str(file.relative_to(run_dir))
        if file.suffix in (".safetensors", ".csv") and not re.match(MEANWHILE, name):
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


MEANWHILE = r"(state|selection)/|.*\.(part|old)\b"
"""Files that a run needs while it goes on."""


def check_cleared(run_dir: Path) -> None:
    """Nothing is left of what a run needs while it goes on.

    Raises:
        Wrong: naming what is.
    """
    files = [str(file.relative_to(run_dir)) for file in run_dir.rglob("*")]
    left = [name for name in files if re.match(MEANWHILE, name)]
    if left:
        raise Wrong("left behind", ", ".join(left[:5]))


def check_alike(run_dir: Path, alone: dict[str, Any]) -> None:
    """The run ended as one that nothing disturbed, whose :func:`remains` are ``alone``.

    Raises:
        Wrong: naming the first differences.
    """
    now = remains(run_dir)
    other = [key for key in sorted(alone | now) if alone.get(key) != now.get(key)]
    if other:
        first = other[0]
        seen = f"{now.get(first)} in place of {alone.get(first)}"
        raise Wrong(
            "wrong result", f"another {', '.join(other[:6])} than the undisturbed run: {seen[:600]}"
        )
