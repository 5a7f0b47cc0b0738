"""Rank by a trained model's scores less the logarithm of popularity, which takes no training: what is left of a gain among popular items?

``python rescore.py saved/runs/<identity> …`` for finished runs of an experiment, of SASRec or SDPO-LLM (its last stage). An item's
popularity is the number of users who met it in training, plus one. Of SDPO-LLM the weights are those that were best on the first
candidate set.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from recbole.model.sequential_recommender import SASRec

from recbole_sdpo.data.sequences import met_items
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.quick_start import run


def rescore(folder: Path, weight: float) -> dict[str, dict]:
    """RecBole's metrics of the run in ``folder`` for each of its candidate sets, ``weight`` log popularity taken off its scores."""
    result = json.loads((folder / "result.json").read_text())
    kind = {"SASRec": SASRec, "SDPO-LLM": SDPOLLM}[result["model"]]
    begin, score = kind.__init__, kind.predict

    def begin_trained(self, config, dataset):
        begin(self, config, dataset)
        met = np.bincount(met_items(dataset)[1], minlength=dataset.item_num)
        self.taken_off = weight * torch.from_numpy(np.log(met + 1)).float()
        if kind is SASRec:
            (checkpoint,) = folder.glob("SASRec*.pth")
            self.load_state_dict(torch.load(checkpoint, weights_only=False)["state_dict"])

    settings = yaml.safe_load(folder.with_suffix(".yaml").read_text()) | {"run_dir": None, "checkpoint_dir": "saved/rescored"}
    if kind is SASRec:
        settings["epochs"] = 0
    else:
        settings |= {"objective": "sft", "sft_checkpoint": str(folder / list(result["stages"])[-1])}
    kind.__init__, kind.predict = begin_trained, lambda self, rows: score(self, rows) - self.taken_off[rows[self.ITEM_ID]]
    try:
        found = run(result["model"], result["dataset"], config_dict=settings, saved=False)
    finally:
        kind.__init__, kind.predict = begin, score
    return {mode: of["test"] for mode, of in list(found["stages"].values())[-1]["candidates"].items()}


folders, sys.argv = sys.argv[1:], sys.argv[:1]  # RecBole reads a program's arguments as settings
for name in folders:
    for weight in (0.0, 1.0):
        for mode, metrics in rescore(Path(name), weight).items():
            print(f"{name} less {weight:g} log popularity, {mode}: HR@1 {metrics['hit@1']:.4f}, NDCG@5 {metrics['ndcg@5']:.4f}")
