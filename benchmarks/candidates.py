"""Validating RecBole's sequential models on 20 candidates: one pass for each target against one
for each candidate: python benchmarks/candidates.py [--models SASRec] [--dataset NAME --data_path
DIR]

Both sides rank the same targets, in turns; the run stops where their metrics differ.
"""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import measure
import torch
from recbole.data import data_preparation

from recbole_sdpo import compat
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.dataset import create_dataset
from recbole_sdpo.loaders import evaluation_loaders
from recbole_sdpo.report.table import markdown_table
from recbole_sdpo.trainer.one_pass import OnePass

MODELS = ["GRU4Rec", "Caser", "SASRec", "BERT4Rec"]


def seconds(model: str, args: argparse.Namespace) -> dict[str, float]:
    """Of a validation by each side, with random weights."""
    given = {"show_progress": False, "MAX_ITEM_LIST_LENGTH": 20}
    if args.data_path:
        given["data_path"] = args.data_path
    config = RunConfig(model, args.dataset, config_dict=given)
    raw = create_dataset(config)
    train_data, *rest = data_preparation(config, raw)
    catalogue = Catalogue.from_dataset(raw, config.settings.title_fields)
    valid_data, _ = next(iter(evaluation_loaders(config, train_data, rest, catalogue).values()))
    torch.manual_seed(0)
    recommender = compat.model_class(model)(config, train_data._dataset).to(config["device"])
    trainers = {
        name: compat.trainer_class(config)(config, recommender) for name in ("ours", "RecBole")
    }
    one_pass = OnePass(recommender, trainers["ours"]._neg_sample_batch_eval)
    trainers["ours"]._neg_sample_batch_eval = one_pass
    for trainer in trainers.values():
        trainer.eval_collector.data_collect(train_data)
    sides = {
        name: partial(trainer.evaluate, valid_data, load_best_model=False)
        for name, trainer in trainers.items()
    }
    ours, theirs = (side() for side in sides.values())
    if ours != theirs:
        raise AssertionError(f"{model}: {ours} and {theirs}")
    if not one_pass.agrees:
        raise AssertionError(f"{model} is asked for each candidate on both sides")
    return measure.median_seconds(sides, args.repeats, torch.device(config["device"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole reads it, too
    logging.disable(logging.INFO)
    rows = []
    for model in args.models:
        took = seconds(model, args)
        rows.append([model, *(f"{s:.2f}" for s in took.values())])
        rows[-1].append(f"{took['RecBole'] / took['ours']:.1f}")
        print(rows[-1], file=sys.stderr)
    print(markdown_table(["model", "ours, s", "RecBole's, s", "ratio"], rows))


if __name__ == "__main__":
    main()
