"""Prefix forest against the plain way, in one process, interleaved: python benchmarks/run.py [--json FILE]

The plain way is the usual preference trainer generalised to K negatives: for each target, K + 1 full padded sequences through
policy and reference, with all logits. Both sides must give the same loss and the same gradient before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from recbole.data import create_dataset, data_preparation

from recbole_sdpo.data.prompts import Prompts
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.objectives import sdpo
from recbole_sdpo.quick_start import ExperimentConfig
from recbole_sdpo.report.table import markdown_table

TARGETS_PLAIN = 16
"""Targets in a plain step; it runs K + 1 sequences for each."""


def plain_logps(model: torch.nn.Module, recommender: SDPOLLM, prompts: Prompts, items: np.ndarray) -> torch.Tensor:
    """log pi of ``items [T, C]``, one full right-padded sequence for each, all logits computed, ``[T, C]``."""
    tokens = recommender.encoder.tokens
    rows, starts = [], []
    for tree, before, choices in zip(prompts.tree, prompts.before, items, strict=True):
        prompt = np.concatenate([tokens[unit] for unit in prompts.trunks[tree][:before]])
        rows += [np.concatenate([prompt, tokens[item]]) for item in choices]
        starts += [len(prompt)] * len(choices)
    width = max(map(len, rows))
    ids = torch.tensor(np.stack([np.pad(row, (0, width - len(row))) for row in rows]))
    length = torch.tensor([len(row) for row in rows])
    place = torch.arange(width)
    mask = (place < length[:, None]).long()
    logps = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)
    picked = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
    asked = (place[1:] >= torch.tensor(starts)[:, None]) & mask[:, 1:].bool()
    return (picked * asked).sum(-1).view(items.shape)


def forest_loss(recommender: SDPOLLM, prompts: Prompts, items: np.ndarray) -> torch.Tensor:
    """Our S-DPO step, up to the loss."""
    found, _ = recommender.logps(prompts, items, reference=True)
    return sdpo(*found, 1.0).mean()


def plain_loss(recommender: SDPOLLM, prompts: Prompts, items: np.ndarray) -> torch.Tensor:
    """The plain S-DPO step, up to the loss."""
    policy = plain_logps(recommender.lm.model, recommender, prompts, items)
    with torch.no_grad():
        reference = plain_logps(recommender.lm._frozen, recommender, prompts, items)
    return sdpo(policy[:, 0], policy[:, 1:], reference[:, 0], reference[:, 1:], 1.0).mean()


def gradient(recommender: SDPOLLM, loss: torch.Tensor) -> torch.Tensor:
    recommender.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in recommender.lm.trainable().values()])


def timed(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each side, run in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_step(recommender: SDPOLLM, loaders: tuple, negatives: int, repeats: int) -> dict[str, float]:
    """One row: targets per second of an S-DPO step both ways."""
    examples = recommender.examples(loaders[0]._dataset, loaders[0]._sampler, negatives)
    trees = np.random.default_rng(0).permutation(len(examples.targets))
    ours = examples.batch(trees[: 64 if examples.targets.max() == 1 else 8], 0, "benchmark")
    prompts, items = ours
    few = np.random.default_rng(1).choice(len(items), min(TARGETS_PLAIN, len(items)), replace=False)
    part = Prompts(prompts.trunks, prompts.tree[few], prompts.before[few], prompts.target[few], prompts.user[few])
    theirs = part, items[few]
    torch.testing.assert_close(forest_loss(recommender, *theirs), plain_loss(recommender, *theirs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradient(recommender, forest_loss(recommender, *theirs)),
        gradient(recommender, plain_loss(recommender, *theirs)),
        rtol=1e-3,
        atol=1e-4,
    )
    seconds = timed(
        {
            "forest": lambda: gradient(recommender, forest_loss(recommender, *ours)),
            "plain": lambda: gradient(recommender, plain_loss(recommender, *theirs)),
        },
        repeats,
    )
    forest, plain = len(items) / seconds["forest"], len(few) / seconds["plain"]
    return {"forest targets/s": forest, "plain targets/s": plain, "ratio": forest / plain}


def build(style: str, history: int) -> tuple[SDPOLLM, tuple]:
    settings = {"prompt_style": style, "MAX_ITEM_LIST_LENGTH": history, "backbone": "scratch", "show_progress": False}
    config = ExperimentConfig("SDPO-LLM", "ml-100k", config_dict=settings)
    loaders = data_preparation(config, create_dataset(config))
    torch.manual_seed(0)
    recommender = SDPOLLM(config, loaders[0]._dataset)
    recommender.lm.freeze_reference()
    with torch.no_grad():  # a policy that has moved, as in the middle of training
        for weight in recommender.lm.trainable().values():
            weight += 0.01 * torch.randn_like(weight)
    return recommender, loaders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--negatives", type=int, nargs="+", default=[1, 3, 7, 15])
    args = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole reads it, too
    rows = []
    for style, history in (("candidates", 10), ("history", 50)):
        recommender, loaders = build(style, history)
        for negatives in args.negatives:
            row = measure_step(recommender, loaders, negatives, args.repeats)
            rows.append({"row": f"S-DPO step, {style}", "K": negatives, **row})
            print(rows[-1], file=sys.stderr)
    print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as stream:
            json.dump({"rows": rows, "torch": torch.__version__, "threads": torch.get_num_threads()}, stream, indent=2)


if __name__ == "__main__":
    main()
