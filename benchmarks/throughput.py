"""How fast are steps and rankings on a device, for a pretrained backbone on ml-100k?

Tokens and targets a second, peak memory, and the share of the device's measured rate of matrix
products.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import measure
import numpy as np
import plain
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from recbole.data import data_preparation
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

from recbole_sdpo.compat import no_arguments
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.dataset import create_dataset
from recbole_sdpo.data.prompts import Prompts, batches, history_prompts
from recbole_sdpo.data.sequences import histories
from recbole_sdpo.lm.ranking import score_all, score_top
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.objectives import Constants, sdpo

Row = dict[str, object]

TRAINED = {
    "LoRA": {"peft": "lora"},
    "full": {"peft": "none"},
    "LoRA, float32": {"peft": "lora", "dtype": "float32"},
    "LoRA, cast to float32": {"peft": "lora"},
    "LoRA, compiled": {"peft": "lora", "compile": True},
    "full, compiled": {"peft": "none", "compile": True},
    "LoRA, whole titles": {"peft": "lora", "item_tokens": "whole"},
    "full, whole titles": {"peft": "none", "item_tokens": "whole"},
    "full, whole titles, float32": {"peft": "none", "item_tokens": "whole", "dtype": "float32"},
    "full, whole titles, compiled": {"peft": "none", "item_tokens": "whole", "compile": True},
}
"""Ways to train; "cast to float32" is what peft does by itself: adapters compute in float32,
under a backbone in bfloat16."""

PLAIN_TARGETS = 32


class Workload:
    """A backbone with a policy that has moved away from its reference, as in the middle of
    training."""

    def __init__(self, trained: str, args: argparse.Namespace) -> None:
        given = {
            "backbone": args.backbone,
            "MAX_ITEM_LIST_LENGTH": 20,
            "title_fields": ["movie_title"],
            "show_progress": False,
        }
        with no_arguments():
            config = RunConfig("SDPO-LLM", "ml-100k", config_dict=given | TRAINED[trained])
            self.loaders = data_preparation(config, create_dataset(config))
            torch.manual_seed(0)
            self.recommender = SDPOLLM(config, self.loaders[0]._dataset).to(config["device"]).eval()
        self.config, self.lm, self.repeats = config, self.recommender.lm, args.repeats
        self.device = self.lm.device
        if trained == "LoRA, cast to float32":
            self.lm.mixed = False
            for part in self.lm.modules():
                if isinstance(part, BaseTunerLayer):
                    part.cast_input_dtype_enabled = True
        self.lm.freeze_reference()
        self.weights = list(self.lm.trainable().values())
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-5, fused=True)
        with torch.no_grad():
            for weight in self.weights:
                weight += 1e-3 * torch.randn_like(weight)

    def batch(self, negatives: int, tokens: int) -> tuple[Prompts, np.ndarray]:
        """A batch of middling size, cut as the trainer cuts them."""
        examples = self.recommender.examples(
            self.loaders[0]._dataset, self.loaders[0]._sampler, negatives
        )
        sizes = examples.sizes(self.recommender.encoder.tokens.lengths)
        cut = batches(sizes, tokens, np.argsort(sizes, kind="stable"))
        return examples.batch(cut[len(cut) // 2], 0, "benchmark")

    def step(self, prompts: Prompts, items: np.ndarray) -> tuple[Callable[[], None], int]:
        """An optimizer step on a planted batch, and the tokens of its forest; with negatives
        S-DPO's, else SFT's."""
        forest = self.recommender.encoder.forest(prompts, items).to(self.device)

        def loss() -> Tensor:
            if items.shape[1] == 1:
                return -self.lm(forest).mean()
            return sdpo(self.recommender(forest, items.shape[1], True)[0], Constants()).mean()

        def run() -> None:
            self.optimizer.zero_grad()
            loss().backward()
            clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()

        return run, forest.size

    def steps(self, negatives: int, tokens: int, attention: str, rate: float) -> Row:
        """Seconds of a step, and what follows from them."""
        self.lm.attention = attention
        prompts, items = self.batch(negatives, tokens)
        run, size = self.step(prompts, items)
        seconds = measure.median_seconds({"ours": run}, self.repeats, self.device)["ours"]
        row = {
            "ms": 1e3 * seconds,
            "tokens": size,
            "tokens/s": size / seconds,
            "targets/s": len(items) / seconds,
        }
        row["share of matrix rate"] = measure.operations(run) / seconds / rate
        return row | {"MiB": measure.peak_mib(run, self.device)}

    def over_products(self, negatives: int, tokens: int) -> Row:
        """A step beside its matrix products alone, in turns: no way to organise the rest could be
        faster than those. Attention's own are not among them where one kernel does it all."""
        prompts, items = self.batch(negatives, tokens)
        run, size = self.step(prompts, items)
        alone = measure.multiplications_alone(run)
        took = measure.median_seconds({"step": run, "products": alone}, self.repeats, self.device)
        return {
            "ms": 1e3 * took["step"],
            "tokens": size,
            "tokens/s": size / took["step"],
            "targets/s": len(items) / took["step"],
            "products, share of the step": took["products"] / took["step"],
        }

    def long_rows(self, window: int, tokens: int) -> Row:
        """Seconds of a step with rows of a length, by a dense mask and by FlexAttention."""
        self.recommender.window = window + 1
        prompts, items = self.batch(15, tokens)
        run, size = self.step(prompts, items)

        def attending(attention: str) -> Callable[[], None]:
            def side() -> None:
                self.lm.attention = attention
                run()

            return side

        took = measure.median_seconds(
            {name: attending(name) for name in ("sdpa", "flex_attention")},
            self.repeats,
            self.device,
        )
        length = self.recommender.encoder.forest(prompts, items).tokens.shape
        return {
            "rows": length[0],
            "columns": length[1],
            "tokens": size,
            **{f"{name}, ms": 1e3 * s for name, s in took.items()},
        }

    def against_plain(self, negatives: int, tokens: int) -> Row:
        """Targets a second, against full sequences for each title, through policy and reference."""
        self.lm.attention = "sdpa"
        prompts, items = self.batch(negatives, tokens)
        part, few = plain.some_targets(prompts, items, PLAIN_TARGETS)
        with torch.no_grad(), self.lm.arithmetic():
            ours_of_few, _ = self.recommender(
                self.recommender.encoder.forest(part, few), items.shape[1], True
            )
            theirs_of_few = plain.sdpo_loss(self.recommender, part, few)
            losses = float(sdpo(ours_of_few, Constants()).mean()), float(theirs_of_few)
        if not abs(losses[0] - losses[1]) <= 0.05 * abs(losses[1]):  # bfloat16's rounding in both
            raise AssertionError(f"the losses are {losses}")
        run, _ = self.step(prompts, items)

        def plainly() -> None:
            self.optimizer.zero_grad()
            with self.lm.arithmetic():
                loss = plain.sdpo_loss(self.recommender, part, few)
            loss.backward()
            clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()

        took = measure.median_seconds({"ours": run, "plain": plainly}, self.repeats, self.device)
        ours, theirs = len(items) / took["ours"], len(few) / took["plain"]
        return {
            "targets/s": ours,
            "plain targets/s": theirs,
            "ratio": ours / theirs,
            "losses": losses,
        }

    def profile(self, negatives: int, tokens: int) -> Row:
        """The share of a step in which the GPU is busy, how many kernels it starts, and which
        take longest."""
        self.lm.attention = "sdpa"
        run, _ = self.step(*self.batch(negatives, tokens))
        seconds = measure.median_seconds({"ours": run}, self.repeats, self.device)["ours"]
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
            run()
            torch.cuda.synchronize()
        kernels = [
            event
            for event in record.key_averages()
            if event.self_device_time_total and event.device_type.name == "CUDA"
        ]
        busy = sum(event.self_device_time_total for event in kernels) / 1e6
        longest = sorted(kernels, key=lambda event: -event.self_device_time_total)[:12]
        waits = {
            event.key: event.count for event in record.key_averages() if "Synchronize" in event.key
        }
        row = {
            "ms": 1e3 * seconds,
            "GPU busy": busy / seconds,
            "kernels": sum(event.count for event in kernels),
            "waits": waits,
        }
        return row | {
            "longest, ms": {
                event.key[:70]: [event.self_device_time_total / 1e3, event.count]
                for event in longest
            }
        }

    @torch.no_grad()
    def ranking(self, users: int) -> Row:
        """Test users a second: 20 candidates, every title, and the ten best titles alone."""
        self.lm.attention = "auto"
        rows = self.loaders[2]._dataset.inter_feat[:users]
        user, target = rows["user_id"].numpy(), rows["item_id"].numpy()
        prompts = history_prompts(
            histories(rows, self.config), target, user, self.recommender.units.header
        )
        others = np.random.default_rng(2).integers(1, self.recommender.n_items, (users, 19))
        items, tree = np.concatenate([target[:, None], others], axis=1), self.recommender.title_tree
        texts = self.recommender.encoder.trunks(prompts)
        few = texts.take(np.arange(min(users, 64)))
        sides: dict[str, Callable[[], object]] = {
            "20 candidates": lambda: self.recommender._score(prompts, items),
            "every title": lambda: score_all(self.lm, few, tree),
            "ten best": lambda: score_top(self.lm, few, tree, 10),
        }
        took = measure.median_seconds(sides, 2, self.device)
        number = {name: users if name == "20 candidates" else len(few) for name in sides}
        return {f"{name}, users/s": number[name] / seconds for name, seconds in took.items()} | {
            "titles": len(tree)
        }


def matrix_rate(device: torch.device, size: int) -> Row:
    """FLOP/s of a bfloat16 matrix product, and bytes a second of a copy, read and written."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    large = torch.empty(size * size * 16, device=device, dtype=torch.uint8)
    took = measure.median_seconds(
        {"product": lambda: left @ right, "copy": lambda: large.clone()}, 10, device
    )
    return {
        "FLOP/s": 2 * size**3 / took["product"],
        "copy, bytes/s": 2 * large.numel() / took["copy"],
    }


def cases(
    args: argparse.Namespace, device: torch.device
) -> Iterator[tuple[str, Callable[[], Row]]]:
    """All measurements by name, in the order of their worth; those of one way to train stand
    together."""
    small, middle, large = args.tokens
    current: dict[str, Workload] = {}

    @cache
    def rate() -> Row:
        return matrix_rate(device, args.matrix)

    def workload(trained: str) -> Workload:
        if trained not in current:
            current.clear()  # one at a time in memory
            gc.collect()
            torch.cuda.empty_cache()
            current[trained] = Workload(trained, args)
        return current[trained]

    def steps(
        trained: str, negatives: int, tokens: int, attention: str = "sdpa"
    ) -> tuple[str, Callable[[], Row]]:
        kind = f"S-DPO, K = {negatives}" if negatives else "SFT"
        name = f"{trained}, {kind}, {tokens} tokens, {attention}"
        return name, lambda: workload(trained).steps(negatives, tokens, attention, rate()["FLOP/s"])

    yield "matrix product and copy", rate
    gpu = device.type == "cuda"
    for trained in ("LoRA", "full"):
        for negatives in (0, 3, 15):
            yield steps(trained, negatives, middle)
        if gpu:
            yield f"{trained}, profile, K = 3", lambda t=trained: workload(t).profile(3, middle)
        for negatives in (3, 15):
            yield (
                f"{trained}, against full sequences, K = {negatives}",
                lambda t=trained, k=negatives: workload(t).against_plain(k, middle),
            )
    if gpu:
        for window in (20, 50, 100, 200):
            yield (
                f"full, S-DPO, K = 15, {window} titles",
                lambda w=window: workload("full").long_rows(w, middle),
            )
    for tokens, negatives in product((large, small), (0, 3, 15)):
        yield steps("full", negatives, tokens)
    yield "full, ranking", lambda: workload("full").ranking(args.users)
    for trained in ("full, whole titles", "full, whole titles, float32", "LoRA, whole titles"):
        for tokens, negatives in product((small, middle), (0, 15)):
            yield steps(trained, negatives, tokens)
        yield f"{trained}, ranking", lambda t=trained: workload(t).ranking(args.users)
    if gpu:
        for negatives in (0, 15):
            yield steps("full, whole titles, compiled", negatives, small)
        for trained, negatives in product(("full, compiled", "LoRA, compiled"), (0, 3)):
            yield steps(trained, negatives, middle)
    for trained, negatives in product(("LoRA, cast to float32", "LoRA, float32"), (0, 3)):
        yield steps(trained, negatives, middle)
    for tokens, negatives in product((small, large), (0, 3, 15)):
        yield steps("LoRA", negatives, tokens)
    yield "LoRA, ranking", lambda: workload("LoRA").ranking(args.users)
