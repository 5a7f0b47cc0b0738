"""The prefix forest against the plain way, in one process, interleaved: python benchmarks/run.py
[--json FILE]

Each row first checks that both sides compute the same numbers, gradients included, and stops where
they do not. README.md beside this file says what each row means.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import measure
import numpy as np
import plain
import torch
from recbole.data import data_preparation
from torch import Tensor

from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.dataset import create_dataset
from recbole_sdpo.data.examples import Examples
from recbole_sdpo.data.prompts import Prompts, batches, history_prompts
from recbole_sdpo.data.sequences import histories
from recbole_sdpo.lm.forest import Forest
from recbole_sdpo.lm.ranking import score_all, score_top
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.objectives import OBJECTIVES, Constants, Logps, Objective, sdpo
from recbole_sdpo.ragged import exclusive_cumsum
from recbole_sdpo.report.table import markdown_table

SCRATCH = {
    "scratch_vocab_size": 2048,
    "scratch_hidden_size": 256,
    "scratch_layers": 4,
    "scratch_heads": 4,
    "scratch_dropout": 0.0,
}
"""The scratch backbone as it is measured: titles of several tokens, as under a pretrained model's
tokenizer, and four layers; by default titles would have one token, and the model two narrow
layers."""

TOKENS = 2048
"""Tokens in our batch."""

PARTS = ("steps", "sft", "objectives", "packing", "ranking")

COLUMNS = (
    "row",
    "K",
    "ours",
    "plain",
    "unit",
    "ratio",
    "tokens ours",
    "tokens plain",
    "MiB ours",
    "MiB plain",
)


@dataclass
class Bench:
    """One backbone and prompt style, and how much of the plain way to run.

    Args:
        plain_targets: targets in a plain step; it runs K + 1 sequences for each.
        plain_titles: titles that the plain way scores of the catalogue.
    """

    style: str
    recommender: SDPOLLM
    loaders: tuple
    repeats: int
    plain_targets: int
    plain_titles: int

    @classmethod
    def build(cls, style: str, args: argparse.Namespace) -> Bench:
        """A policy that has moved away from its reference, as in the middle of training."""
        given = {
            "prompt_style": style,
            "MAX_ITEM_LIST_LENGTH": 10 if style == "candidates" else 50,
            "backbone": args.backbone,
        }
        given |= SCRATCH | {"show_progress": False}
        config = RunConfig("SDPO-LLM", "ml-100k", config_dict=given)
        loaders = data_preparation(config, create_dataset(config))
        torch.manual_seed(0)
        recommender = SDPOLLM(config, loaders[0]._dataset).to(config["device"]).eval()
        recommender.lm.freeze_reference()
        with torch.no_grad():
            for weight in recommender.lm.trainable().values():
                weight += 0.01 * torch.randn_like(weight)
        return cls(style, recommender, loaders, args.repeats, args.plain_targets, args.plain_titles)

    @property
    def device(self) -> torch.device:
        return self.recommender.lm.device

    def examples(self, negatives: int) -> Examples:
        return self.recommender.examples(
            self.loaders[0]._dataset, self.loaders[0]._sampler, negatives
        )

    def batch(self, examples: Examples) -> np.ndarray:
        """The trees of a batch of middling size, cut as the trainer cuts them."""
        sizes = examples.sizes(self.recommender.encoder.tokens.lengths)
        order = np.random.default_rng(0).permutation(len(sizes))[:256]
        cut = batches(sizes, TOKENS, order[np.argsort(sizes[order], kind="stable")])
        return cut[len(cut) // 2]

    def loss(self, prompts: Prompts, items: np.ndarray, known: Tensor | None = None) -> Tensor:
        """Our S-DPO step up to the loss, packing included."""
        forest = self.recommender.encoder.forest(prompts, items)
        logps, _ = self.recommender(forest, items.shape[1], True, known)
        return sdpo(logps, Constants()).mean()

    def gradient(self, loss: Callable[[], Tensor]) -> list[Tensor]:
        """A step up to the optimizer."""
        self.recommender.zero_grad()
        loss().backward()
        return [p.grad for p in self.recommender.lm.trainable().values()]

    def learn(self, steps: int) -> None:
        """Some SFT: a search that leaves out the improbable needs a model that finds something
        improbable."""
        examples, lm = self.examples(0), self.recommender.lm
        sizes = examples.sizes(self.recommender.encoder.tokens.lengths)
        optimizer = torch.optim.AdamW(lm.trainable().values(), lr=1e-3, fused=True)
        cut = batches(sizes, TOKENS // 2, np.random.default_rng(4).permutation(len(sizes)))
        for number in range(steps):
            forest = self.recommender.encoder.forest(
                *examples.batch(cut[number % len(cut)], 0, number)
            )
            self.gradient(lambda forest=forest: -lm(forest).mean())
            optimizer.step()

    def seconds(self, **sides) -> dict[str, float]:
        return measure.median_seconds(sides, self.repeats, self.device)

    def sdpo_step(self, negatives: int) -> dict[str, object]:
        """Rows 1 and 2."""
        examples = self.examples(negatives)
        prompts, items = examples.batch(self.batch(examples), 0, "benchmark")
        part, few = plain.some_targets(prompts, items, self.plain_targets)

        def ours() -> list[Tensor]:
            return self.gradient(lambda: self.loss(prompts, items))

        def ours_of_few() -> list[Tensor]:
            return self.gradient(lambda: self.loss(part, few))

        def plainly() -> list[Tensor]:
            return self.gradient(lambda: plain.sdpo_loss(self.recommender, part, few))

        loose = self.recommender.lm.causal_lm.dtype == torch.bfloat16
        with torch.no_grad():
            expected = plain.sdpo_loss(self.recommender, part, few)
            torch.testing.assert_close(
                self.loss(part, few), expected, rtol=3e-2 if loose else 1e-4, atol=1e-5
            )
        sides = ours_of_few, plainly
        gradient, expected = (torch.cat([g.flatten() for g in side()]) for side in sides)
        difference = float((gradient - expected).norm() / expected.norm())
        if not difference < (5e-2 if loose else 1e-3):
            raise AssertionError(f"the gradients differ by {difference:.1e} of their norm")
        peaks = [measure.peak_mib(side, self.device) for side in (ours_of_few, plainly)]
        took = self.seconds(ours=ours, plain=plainly)
        tokens = self.recommender.encoder.forest(prompts, items).size / len(items)
        every = plain.sequence_tokens(self.recommender, part, few) / len(few)
        rates = len(items) / took["ours"], len(few) / took["plain"]
        return _row(
            f"S-DPO step, {self.style}", negatives, *rates, "targets/s", tokens, every, *peaks
        )

    def sdpo_over_sft(self, negatives: int) -> list[dict[str, object]]:
        """Row 3: times of the same targets' steps, and how many times an SFT step an S-DPO step
        takes."""
        examples = self.examples(negatives)
        prompts, items = examples.batch(self.batch(examples), 0, "benchmark")
        with torch.no_grad():
            known = self.recommender.lm.reference_logps(
                self.recommender.encoder.forest(prompts, items)
            ).view(items.shape)
        sides = {
            "sft": lambda: self.gradient(
                lambda: (
                    -self.recommender.lm(
                        self.recommender.encoder.forest(prompts, items[:, :1])
                    ).mean()
                )
            ),
            "computed": lambda: self.gradient(lambda: self.loss(prompts, items)),
            "cached": lambda: self.gradient(lambda: self.loss(prompts, items, known)),
        }
        torch.testing.assert_close(sides["cached"](), sides["computed"](), rtol=1e-3, atol=1e-5)
        took = self.seconds(**sides)
        return [
            {
                "row": f"S-DPO step over SFT step, {self.style}, reference {way}",
                "K": negatives,
                "times": took[way] / took["sft"],
            }
            | {"SFT ms": 1e3 * took["sft"], "S-DPO ms": 1e3 * took[way]}
            for way in ("computed", "cached")
        ]

    def objectives(self, negatives: int) -> dict[str, object]:
        """Steps of every objective that has negatives, as multiples of S-DPO's on the same
        batch."""
        examples = self.examples(negatives)
        prompts, items = examples.batch(self.batch(examples), 0, "benchmark")
        part, few = plain.some_targets(prompts, items, self.plain_targets)

        def loss(objective: Objective, prompts: Prompts, items: np.ndarray) -> Tensor:
            forest = self.recommender.encoder.forest(prompts, items)
            logps, _ = self.recommender(forest, items.shape[1], objective.reference)
            return objective.losses(rated(logps), Constants()).mean()

        def rated(logps: Logps) -> Logps:
            return logps._replace(rating=torch.full_like(logps.policy_pos, 4.0))

        aligned = {name: kind for name, kind in OBJECTIVES.items() if kind.negatives == math.inf}
        with torch.no_grad():
            expected = rated(plain.logps(self.recommender, part, few))
            for kind in aligned.values():
                torch.testing.assert_close(
                    loss(kind, part, few),
                    kind.losses(expected, Constants()).mean(),
                    rtol=1e-3,
                    atol=1e-4,
                )
        sides = {
            name: lambda kind=kind: self.gradient(lambda: loss(kind, prompts, items))
            for name, kind in aligned.items()
        }
        # Without a reference, preferences of random weights are so sure that gradients are
        # denormal numbers, with which a CPU takes twice as long; of trained weights they are not.
        torch.set_flush_denormal(True)
        took = self.seconds(**sides)
        torch.set_flush_denormal(False)
        times = {name: seconds / took["sdpo"] for name, seconds in took.items()}
        return {"row": f"steps over S-DPO's, {self.style}", "K": negatives} | times

    @torch.no_grad()
    def rank_candidates(self, users: int = 32) -> dict[str, object]:
        """Row 4: the target and 19 sampled items."""
        prompts, items = self._asked(users)
        items = np.concatenate(
            [items, np.random.default_rng(2).integers(1, self.recommender.n_items, (users, 19))],
            axis=1,
        )
        few = np.arange(min(users, max(1, self.plain_targets // 2)))
        part = prompts.select(few)
        model = self.recommender.lm.causal_lm

        def plainly() -> Tensor:
            return plain.score(model, self.recommender, part, items[few])

        def ours() -> Tensor:
            return self.recommender._score(prompts, items)

        torch.testing.assert_close(ours()[: len(few)], plainly(), rtol=1e-3, atol=1e-3)
        peaks = [
            measure.peak_mib(side, self.device)
            for side in (lambda: self.recommender._score(part, items[few]), plainly)
        ]
        took = self.seconds(ours=ours, plain=plainly)
        return _row(
            "ranking 20 candidates",
            None,
            users / took["ours"],
            len(few) / took["plain"],
            "users/s",
            None,
            None,
            *peaks,
        )

    @torch.no_grad()
    def rank_catalogue(self, users: int = 16) -> list[dict[str, object]]:
        """Row 4, all titles: exactly, and exactly for the ten best alone."""
        prompts, _ = self._asked(users)
        lm, tree, texts = (
            self.recommender.lm,
            self.recommender.title_tree,
            self.recommender.encoder.trunks(prompts),
        )
        some = np.random.default_rng(3).permutation(len(tree))[: self.plain_titles or len(tree)]
        one = prompts.select(np.array([0]))

        def plainly() -> Tensor:
            return plain.score(lm.causal_lm, self.recommender, one, 1 + some[None])

        exact, best, expected = (
            score_all(lm, texts, tree),
            score_top(lm, texts, tree, 10),
            plainly(),
        )
        torch.testing.assert_close(exact[:1, some], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            best.topk(10).values, exact.topk(10).values, rtol=1e-3, atol=1e-3
        )
        sides = {
            "exact": lambda: score_all(lm, texts, tree),
            "top": lambda: score_top(lm, texts, tree, 10),
            "plain": plainly,
        }
        peaks = {name: measure.peak_mib(side, self.device) for name, side in sides.items()}
        took = self.seconds(**sides)
        slow = len(some) / len(tree) / took["plain"]
        name = f"ranking the catalogue ({len(tree):,} titles)"
        return [
            _row(
                f"{name}, exact",
                None,
                users / took["exact"],
                slow,
                "users/s",
                None,
                None,
                peaks["exact"],
                peaks["plain"],
            ),
            _row(
                f"{name}, full_sort=topk, k=10",
                None,
                users / took["top"],
                slow,
                "users/s",
                None,
                None,
                peaks["top"],
                peaks["plain"],
            ),
        ]

    def packing(self, negatives: int) -> dict[str, object]:
        """Row 5: drawing negatives and planting the forest, as a share of the whole step; and
        the layout of the trees."""
        examples = self.examples(negatives)
        trees = self.batch(examples)
        optimizer = torch.optim.AdamW(self.recommender.lm.trainable().values(), lr=0.0, fused=True)
        lm = self.recommender.lm

        def pack() -> tuple[Forest, int]:
            prompts, items = examples.batch(trees, 0, "benchmark")
            return self.recommender.encoder.forest(prompts, items), items.shape[1]

        def step(forest: Forest, width: int) -> None:
            optimizer.zero_grad()
            sdpo(self.recommender(forest, width, True)[0], Constants()).mean().backward()
            optimizer.step()

        packed = pack()
        together = in_one_row(packed[0])
        with torch.no_grad():
            torch.testing.assert_close(lm(together), lm(packed[0]), rtol=1e-3, atol=1e-3)
        sides = {
            "packing": pack,
            "step": lambda: step(*packed),
            "one row": lambda: step(together, packed[1]),
        }
        alone = measure.multiplications_alone(sides["step"])
        took = self.seconds(multiplications=alone, **sides)
        whole = took["packing"] + took["step"]
        row = {
            "row": f"packing as a share of the S-DPO step, {self.style}",
            "K": negatives,
            "share": took["packing"] / whole,
        }
        row |= {"step ms": 1e3 * whole, "padding": 1 - packed[0].size / packed[0].tokens.numel()}
        row |= {"all trees in one row, times the step": took["one row"] / took["step"]}
        row |= {
            "matrix multiplications alone, share of the step": took["multiplications"]
            / took["step"]
        }
        if self.device.type == "cpu":
            row["where the step goes"] = measure.shares(
                sides["step"], lm.causal_lm.config.get_text_config().vocab_size
            )
        return row

    def trl(self) -> dict[str, object] | None:
        """TRL's DPOTrainer on the same pairs, K = 1; None where it is not installed, or for
        adapters, whose reference it loads itself."""
        try:
            from with_trl import dpo_loss
        except ImportError as error:
            print(f"no row for TRL: {error}", file=sys.stderr)
            return None
        if self.recommender.backbone.peft != "none":
            print("no row for TRL: it is compared without adapters", file=sys.stderr)
            return None
        examples = self.examples(1)
        prompts, items = examples.batch(self.batch(examples), 0, "benchmark")
        part, few = plain.some_targets(prompts, items, self.plain_targets)
        theirs = dpo_loss(self.recommender, *plain.sequences(self.recommender, part, few))
        with torch.no_grad():
            torch.testing.assert_close(theirs(), self.loss(part, few), rtol=1e-4, atol=1e-5)
        took = self.seconds(
            ours=lambda: self.gradient(lambda: self.loss(prompts, items)),
            trl=lambda: theirs().backward(),
        )
        rates = len(items) / took["ours"], len(few) / took["trl"]
        return _row(
            f"DPO step, {self.style}, plain is TRL {version('trl')}",
            1,
            *rates,
            "targets/s",
            None,
            None,
            None,
            None,
        )

    def _asked(self, users: int) -> tuple[Prompts, np.ndarray]:
        """History prompts of test users, with their targets ``[users, 1]``."""
        rows = self.loaders[2]._dataset.inter_feat[:users]
        user, target = rows["user_id"].numpy(), rows["item_id"].numpy()
        past = histories(rows, self.recommender.config)
        return history_prompts(past, target, user, self.recommender.units.header), target[:, None]


def in_one_row(forest: Forest) -> Forest:
    """The same trees one after another in a single row, without padding."""
    # a tree ends where its root's subtree ends
    real = torch.arange(forest.tokens.shape[1]) < forest.end[:, :1]
    sizes = real.sum(1)
    before = torch.from_numpy(exclusive_cumsum(sizes.numpy()))
    where = torch.full(real.shape, -1)
    where[real] = torch.arange(int(sizes.sum()))
    return replace(
        forest,
        tokens=forest.tokens[real][None],
        positions=forest.positions[real][None],
        end=(forest.end + before[:, None])[real][None],
        states=where.flatten()[forest.states],
        chains=forest.chains and len(sizes) == 1,
    )


def _row(
    name, negatives, ours, plainly, unit, tokens, plain_tokens, mib, plain_mib
) -> dict[str, object]:
    return dict(
        zip(
            COLUMNS,
            (
                name,
                negatives,
                ours,
                plainly,
                unit,
                ours / plainly,
                tokens,
                plain_tokens,
                mib,
                plain_mib,
            ),
            strict=True,
        )
    )


def show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {show(part)}" for key, part in value.items())
    return "" if value is None else str(value)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="scratch", help="as the setting of that name")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--negatives",
        type=int,
        nargs="+",
        default=[1, 3, 7, 15],
        help="K of the rows that compare steps",
    )
    parser.add_argument("--plain-targets", type=int, default=16, help="targets in a plain step")
    parser.add_argument(
        "--plain-titles",
        type=int,
        help="titles that the plain way scores, the rest counted alike; default all",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="which rows to measure; default all",
    )
    parser.add_argument(
        "--sft-steps", type=int, default=300, help="of training before the rows that rank"
    )
    args = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole reads it, too
    logging.disable(logging.INFO)
    compared, others = [], []

    def note(row: dict[str, object] | None, rows: list) -> None:
        if row:
            rows.append(row)
            print({key: show(value) for key, value in row.items()}, file=sys.stderr)

    for style in ("candidates", "history"):
        bench = Bench.build(style, args)
        if "steps" in args.parts:
            for negatives in args.negatives:
                note(bench.sdpo_step(negatives), compared)
            note(bench.trl(), compared)
        if "sft" in args.parts:
            for row in bench.sdpo_over_sft(15):
                note(row, others)
        if "objectives" in args.parts and style == "history":
            note(bench.objectives(3), others)
        if "packing" in args.parts:
            note(bench.packing(3), others)
    if "ranking" in args.parts:
        bench.learn(args.sft_steps)
        note(bench.rank_candidates(), compared)
        for row in bench.rank_catalogue():
            note(row, compared)

    machine = {
        "device": device_name(bench.device),
        "threads": torch.get_num_threads(),
        "dtype": str(bench.recommender.lm.causal_lm.dtype),
        "backbone": args.backbone,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "recbole")},
        "date": time.strftime("%Y-%m-%d"),
    }
    print(markdown_table(COLUMNS, [[show(row[column]) for column in COLUMNS] for row in compared]))
    for row in others:
        print(
            f"\n{row['row']}, K = {row['K']}: "
            + ", ".join(f"{key} {show(row[key])}" for key in list(row)[2:])
        )
    print(f"\n{json.dumps(machine)}")
    if args.json:
        Path(args.json).write_text(
            json.dumps({"rows": [*compared, *others], "machine": machine}, indent=2) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
