"""What ``datasets`` makes: each user is tested on the last event, or one sentence names the
file."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from tests.faults import datasets, oracle, toy
from tests.faults.judge import Wrong, ended_well
from tests.faults.trial import Trial

LONG, SHORT = 200, 5

NAMES = [".inter", ".item", "title", "timestamp", "users", "items"]
NAMES += ["eval_args", "train_neg_sample_args", "topk", "max_item_list_length"]

FILTERS = {"user_inter_num_interval", "rm_dup_inter", "val_interval", "benchmark_filename"}
"""Settings that leave users, or events of theirs, out."""


def attempt(trial: Trial) -> str:
    """One dataset, under one model."""
    rng = np.random.default_rng(trial.draw.randrange(2**32))
    files, settings, what = datasets.broken(rng)
    model = trial.draw.choice(["SDPO-LLM", "SDPO-LLM", "BPR", "SASRec", "Pop"])
    trial.what = f"{model}: {what}"
    folder = trial.folder / "data" / "toy"
    folder.mkdir(parents=True)
    for end, content in files.items():
        (folder / f"toy.{end}").write_bytes(content)
    epochs = {"sft_epochs": 1, "sdpo_epochs": 1} if model == "SDPO-LLM" else {}
    all_of_them = toy.settings(model, data_path="data", run_dir="run", **epochs, **settings)
    if not ended_well(trial.run(all_of_them, model=model), [*NAMES, *settings]):
        return "sentence"
    oracle.check_metrics(trial.folder / "run")
    _check_targets(trial, files, settings)
    return "result"


def _check_targets(trial: Trial, files: dict[str, bytes], settings: dict[str, Any]) -> None:
    separator, encoding = settings.get("field_separator", "\t"), settings.get("encoding", "utf-8")
    try:
        last = datasets.last_items(files, separator, encoding)
    except (ValueError, IndexError) as error:
        raise Wrong("wrong result", f"it was read, and the slow reader says: {error}") from error
    tested = {row["user"]: row["item"] for row in oracle.ranks(trial.folder / "run")}
    filtered = bool(FILTERS & settings.keys())
    if not filtered:
        events = Counter(
            line.split(separator)[0] for line in files["inter"].decode(encoding).splitlines()
        )
        oracle.check_targets(
            trial.folder / "run",
            {user: item for user, item in last.items() if user in tested or events[user] > 3},
        )
